"""Items as a model is shown them: questions, ground truth, the words of a prompt, the metric.

What rollout, embed and evaluate all need. May import all of lever_data but ``report``.
"""
