"""SQL over the store: the catalog of sql/, sessions, rewards, selections, streams, `lever query`.

May import ``store``; never ``sources``, ``items`` or ``report``.
"""
