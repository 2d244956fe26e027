"""Items as a model is shown them: questions, ground truth, the words of a prompt, the metric.

What ingest, rollout, embed and evaluate all need. May import ``relations``, not ``sources``.
"""
