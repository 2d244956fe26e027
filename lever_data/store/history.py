"""The store as it was: the runs that were there at a moment, and what was removed since.

A removal leaves a note in the store, ``removed/<run>-<digits>.json``, so that a figure of the past
is the same or an error, never another. ``LEVER_AS_OF`` (``lever --as-of``) names the moment. Runs
that were compacted into one (``compact.py``) stay in the store for it, hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from lever_data.errors import LeverError, UsageError
from lever_data.store.manifest import Inventory, Run

AS_OF = "LEVER_AS_OF"
FOLDER = "removed"
MEMBERS = "compacts"  # parameter of a compacted run: the ids of all runs whose rows it holds


@dataclass(frozen=True)
class Removal:
    """A run that is gone; ``committed_at`` is null where its manifest could not be read."""

    run: str
    committed_at: str | None
    removed_at: str

    def to_json(self) -> bytes:
        """What the note holds."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


def inventory_as_of(found: Inventory, removals: Sequence[Removal], moment: str) -> Inventory:
    """The runs that were committed by a moment; a damaged run stays damaged.

    Args:
        moment: a run, itself included, or a prefix that only it has; or a time as ISO 8601 has it,
            UTC where it names no zone.

    Raises:
        UsageError: it is neither.
        LeverError: a run that was there is removed; all of them are named.
    """
    here = {(run.run, run.committed_at) for run in found.runs}
    # the note is written first: a run whose removal was cut short is there
    gone = [r for r in removals if (r.run, r.committed_at) not in here]
    last = _moment(found, gone, moment)
    kept = [run for run in found.runs if (_time(run.committed_at), run.run) <= last]
    missed = sorted({r.run for r in gone if _was_there(r, last)} - _members(kept))
    if missed:
        raise LeverError(
            f"the store cannot be read as of {moment}: runs that were there are removed",
            value=", ".join(missed),
            hint="name a later moment; or leave --as-of out and name the runs with --run",
        )
    return Inventory(kept, found.damaged)


def without_members(found: Inventory) -> Inventory:
    """The same with those runs hidden whose rows a compacted run holds."""
    members = _members(found.runs)
    hidden = [run for run in found.runs if run.run in members]
    return Inventory([r for r in found.runs if r.run not in members], found.damaged, hidden)


def _members(runs: Sequence[Run]) -> set[str]:
    """The runs that compacted ones among ``runs`` stand for.

    Of two that hold one run, which two machines made at once, the first counts.
    """
    members: set[str] = set()
    for run in sorted(runs, key=lambda run: (run.committed_at, run.run)):
        if MEMBERS in run.parameters:
            late = not members.isdisjoint(run.parents)
            members.update([run.run] if late else run.parameters[MEMBERS])
    return members


_LAST = "~"  # after every run id


def _moment(found: Inventory, gone: Sequence[Removal], moment: str) -> tuple[datetime, str]:
    """The last place in the order of commits that counts: a time, and the id of a run."""
    try:
        return _time(moment), _LAST
    except ValueError:
        pass
    runs = {run.run: run.committed_at for run in found.runs}
    names = [n for n in runs if n == moment] or [n for n in runs if n.startswith(moment)]
    if len(names) == 1:
        return _time(runs[names[0]]), names[0]
    for removal in gone:
        if not names and removal.run.startswith(moment):
            raise LeverError(
                "the store cannot be read as of a run that is removed",
                value=removal.run,
                hint=f"it was removed at {removal.removed_at}; a time names a moment, too",
            )
    raise UsageError(
        "several runs begin like this" if names else "this is neither a run nor a time",
        where="--as-of",
        value=moment,
        hint="`lever runs` lists the runs and when they were committed, in UTC; a time is "
        "written 2026-11-29T10:30",
    )


def _was_there(removal: Removal, last: tuple[datetime, str]) -> bool:
    """Whether a run that is gone was there at a moment."""
    if _time(removal.removed_at) <= last[0]:
        return False
    return removal.committed_at is None or (_time(removal.committed_at), removal.run) <= last


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found
