"""The whole pipeline as steps with keys, its config, and the legacy arguments for it."""
