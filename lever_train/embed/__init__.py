"""Embeddings through transformers."""
