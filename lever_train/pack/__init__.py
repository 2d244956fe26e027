"""A trained selector for other programs: packed into a folder, loaded from it, asked.

May import evaluation and what is below it; ``load.py`` and what it imports is what a program loads.
"""
