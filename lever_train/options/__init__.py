"""Every option, defined once: pydantic models from which flags, TOML keys, help and docs derive.

Imports ``lever_data`` alone, and never torch: the command line is made from these models.
"""
