"""Rollouts: propose candidates, ask a model, score its answers, store them; also InfoScore beams.

May import ``options``, ``inputs`` and ``selector``; never ``learn``.
"""
