"""The world of `lever demo`: made-up questions, pictures' words and answers, and their files.

A fixture that ships with the product. May import everything; only ``cli`` imports it.
"""
