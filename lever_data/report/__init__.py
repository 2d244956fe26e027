"""What is said about a store: audit, gate, check, diff, rescore, and the pages that show it.

May import all of lever_data; nothing of lever_data imports it.
"""
