"""The reward modes as their files say: one ``sql/macros/reward_<mode>.sql`` each.

In goes the text of a file; out comes a :class:`RewardMode`: what its header says it reads and can
give at most, and the parameters of its macro. Training, audit, sweep and the help of commands ask
here; :func:`comparison_sql` is the relation that sets all of them side by side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MACRO = re.compile(r"^create or replace macro \w+\((.*?)\)\s+as$", re.DOTALL | re.MULTILINE)
_READ = re.compile(
    r"(?P<columns>\w+(?: if \w+)?(?: else \w+(?: if \w+)?)*)(?: unless (?P<unless>\w+))?"
    r"(?: weighed by (?P<rest>1 - )?(?P<weight>\w+))?"
)
UNBOUNDED = "unbounded"


@dataclass(frozen=True)
class Read:
    """A value a mode reads.

    Args:
        columns: where it comes from, each in place of the one before where that is null, with the
            flag that must be set for it to count.
        weight: the parameter that weighs it (1 without one), or of which the rest to 1 does.
        is_rest: whether it is that rest.
        unless: a column; where it is 1, the value does not matter.
    """

    columns: tuple[tuple[str, str | None], ...]
    weight: str | None
    is_rest: bool
    unless: str | None


@dataclass(frozen=True)
class RewardMode:
    """A mode: what it is in words, the parameters its macro is called with, what it reads.

    ``largest`` and ``requires`` are SQL over the parameters: the largest reward at given weights
    (``None``: without a bound), and what must hold in every row for the mode to be computed.
    """

    name: str
    purpose: str
    parameters: tuple[str, ...]
    reads: tuple[Read, ...]
    largest: str | None
    requires: str | None


def parse_mode(name: str, text: str) -> RewardMode:
    """Read a mode's file.

    Its header says, after what the mode is::

        -- reads:
        --   COLUMN [if FLAG] [else COLUMN …] [unless COLUMN] [weighed by [1 - ]PARAMETER]
        -- largest: SQL over the parameters, or unbounded
        -- requires: SQL over the parameters that holds in every row (optional)

    A parameter with a default is a number of the mode's own and not passed.
    """
    macro = _MACRO.search(text)
    parts = _header(text)
    reads = [_READ.fullmatch(line.strip()) for line in parts["reads"]]
    if macro is None or not reads or None in reads or not parts["largest"]:
        raise AssertionError(f"reward_{name}.sql: its header or macro is not that of a reward mode")
    parameters = [p.strip() for p in macro[1].split(",")]
    largest = " ".join(parts["largest"])
    return RewardMode(
        name=name,
        purpose=" ".join(parts["purpose"]),
        parameters=tuple(p for p in parameters if ":=" not in p),
        reads=tuple(_read(match) for match in reads if match is not None),
        largest=None if largest == UNBOUNDED else largest,
        requires=" ".join(parts["requires"]) or None,
    )


def _header(text: str) -> dict[str, list[str]]:
    """The lines of the header comment by what they are about."""
    parts: dict[str, list[str]] = {"purpose": [], "reads": [], "largest": [], "requires": []}
    about = "purpose"
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        said = line.removeprefix("--").strip()
        key, colon, rest = said.partition(":")
        if colon and key in parts:
            about, said = key, rest.strip()
        if said:
            parts[about].append(said)
    return parts


def _read(match: re.Match[str]) -> Read:
    columns = [part.partition(" if ") for part in match["columns"].split(" else ")]
    return Read(
        columns=tuple((column, flag or None) for column, _, flag in columns),
        weight=match["weight"],
        is_rest=match["rest"] is not None,
        unless=match["unless"],
    )


_COMPARISON = """\
-- The reward that every mode gives to the same candidates (scored_sample), at the weights of
-- audit_settings. A mode is left out where a score it weighs is null throughout, where each of its
-- weights is 0, or where a row does not hold what it requires.
-- grain: one row per candidate and reward mode
-- columns:
--   query bigint: number of the query in the sample
--   item bigint: number of the candidate in the sample
--   correct tinyint: 1 where the metric calls the answer right, else 0
--   mode integer: number of the mode, in the order of names
--   reward_mode varchar: the mode, or the user's expression
--   reward double: its reward in [-5, 5]
--   default_reward double: the reward of hard_plus_soft
with settings as (select * from audit_settings),

informed as not materialized (
    select * from candidate_info
    where query_id in (select query_id from scored_sample)
),

source as (
    select
        v.*,
        informed.info,
        -- Numbers for texts: everything after this groups and joins by them.
        dense_rank() over (order by v.dataset, v.split, v.query_id) as query,
        row_number() over () as item
    from scored_sample as v
    left join informed using (run, dataset, split, query_id, candidate)
),

known as (
    select
        {known}
    from source
    cross join settings
),

wide as (
    select
        v.query,
        v.item,
        v.correct,
        reward_clip({default}) as default_reward,
        unnest(range({count})::integer[]) as mode,
        unnest([{names}, s.reward_name]) as reward_mode,
        unnest([
            {rewards},
            case when s.is_expression then v.reward end
        ]) as reward
    from source as v
    cross join settings as s
    cross join known as k
),

final as (
    select
        query,
        item,
        correct,
        mode,
        reward_mode,
        reward_clip(reward) as reward,
        default_reward
    from wide
    where reward is not null
)

select * from final
"""


def comparison_sql(modes: Mapping[str, RewardMode], settings: Sequence[str]) -> str:
    """The relation ``mode_rewards``, header and all.

    Args:
        modes: every mode by name.
        settings: the parameters that are weights: columns of ``audit_settings``.
    """
    columns = sorted({c for mode in modes.values() for r in mode.reads for c, _ in r.columns})
    known = [f"count({column}) > 0 as has_{column}" for column in columns]
    known += [
        f"bool_and(coalesce({mode.requires}, false)) as can_{mode.name}"
        for mode in modes.values()
        if mode.requires is not None
    ]
    calls = {name: _call(mode, settings) for name, mode in modes.items()}
    return _COMPARISON.format(
        known=",\n        ".join(known),
        default=calls["hard_plus_soft"],
        count=len(modes) + 1,
        names=", ".join(f"'{name}'" for name in modes),
        rewards=",\n            ".join(
            f"case when {_is_known(mode)} then\n                {calls[mode.name]}\n            end"
            for mode in modes.values()
        ),
    )


def _call(mode: RewardMode, settings: Sequence[str]) -> str:
    arguments = [f"s.{p}" if p in settings else f"v.{p}" for p in mode.parameters]
    return f"reward_{mode.name}({', '.join(arguments)})"


def _is_known(mode: RewardMode) -> str:
    """Whether the sample has every score the mode weighs, and it weighs any."""
    weights, conditions = [], []
    for read in mode.reads:
        weights.append("1" if read.weight is None else f"{'1 - ' * read.is_rest}s.{read.weight}")
        stored = " or ".join(
            f"k.has_{column}" if flag is None else f"s.{flag} and k.has_{column}"
            for column, flag in read.columns
        )
        conditions.append(f"({weights[-1]} = 0 or {stored})")
    conditions.append(f"({' or '.join(f'{weight} <> 0' for weight in weights)})")
    if mode.requires is not None:
        conditions.append(f"k.can_{mode.name}")
    return " and ".join(conditions)
