"""Files that come in, read without trust: bytes become JSON values, tensors, vectors, or an error.

Knows no table of the store but its schema; what a file means is said in ``sources``.
"""
