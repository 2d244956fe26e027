"""What files mean: RL data, beams, official questions, vectors, in and out of the store.

May import ``readers`` and ``store``; never ``relations``, ``items`` or ``report``.
"""
