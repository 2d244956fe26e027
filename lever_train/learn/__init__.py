"""Training: view → batches → losses → optimizer, its state, its folder and its figures.

May import ``options``, ``inputs`` and ``selector``.
"""
