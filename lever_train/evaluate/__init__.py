"""What a selector is worth to the model, beside its baselines; and its picks for new questions.

May import ``rollout`` and what it may import.
"""
