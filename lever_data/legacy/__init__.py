"""The legacy formats, RL data and beams: decoded to Arrow batches, and written back as records."""
