"""Answerers: models, endpoints and rules that answer prompts, behind one interface."""
