"""Vectors of items from an encoder.

May import ``options``, ``inputs`` and ``lever_data``.
"""
