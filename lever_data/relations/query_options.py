"""Limits and scope of ``lever query``. Light: the command is made of it."""

from __future__ import annotations

import threading

from lever_data.options import Section, option
from lever_data.vocabulary import RunNames, SqlDir


class QueryOptions(Section):
    """Limits and scope of a query; the process is held to about twice its ``memory``."""

    runs: RunNames = ()
    sql_dir: SqlDir = None
    timeout: float = option(
        300.0, "Seconds the query may take.", metavar="N", gt=0, le=threading.TIMEOUT_MAX
    )
    memory: float = option(4.0, "Gigabytes the query may use.", metavar="N", gt=0, lt=1e6)
