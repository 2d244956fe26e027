"""What files mean: RL data, beams, official questions, vectors, in and out of the store.

May import ``readers``, ``store`` and ``items``; never ``report``.
"""
