"""The store of lever and everything columnar. Nothing in here imports torch."""
