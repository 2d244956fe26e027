"""The selector: model, attention, log-probabilities of pointers, checkpoints in every format.

May import ``options`` and ``inputs``; never ``learn``, ``rollout``, ``evaluate`` or ``flow``.
"""
