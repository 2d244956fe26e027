"""``lever generate``: propose candidates, have them answered and scored, store them as a run.

The options are the fields of ``lever_train.options.rollout``: each has one definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lever_train.options.rollout import AnswererSpec, Inputs, Recipe, Request, Which

from .common import (
    DEFAULT_STORE,
    JsonFlag,
    RunsOption,
    SqlDirOption,
    StoreOption,
    emit_json,
    notice,
    progress_bar,
)
from .flags import build, with_flags

if TYPE_CHECKING:
    from lever_train.rollout.generate import Forecast, Outcome


def generate(
    store: StoreOption = DEFAULT_STORE,
    run: RunsOption = [],  # noqa: B006 - typer copies it
    sql_dir: SqlDirOption = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Of ray.")] = 2,
    shard: Annotated[str, typer.Option(help="i/n: only the shards of machine i of 0…n-1.")] = "0/1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many answers would be asked.")
    ] = False,
    json: JsonFlag = False,
    **flags: Any,
) -> None:
    """Generate RL data: propose candidates, have them answered, score the answers.

    Finished shards are kept: after a crash the same command goes on and ends with the same bytes.
    """
    from dataclasses import replace

    from lever_train.rollout import generate as rollout

    inputs = build(Inputs, flags)
    request = build(
        Request,
        flags,
        which=build(Which, flags, store=store, runs=tuple(run), sql_dir=sql_dir),
        inputs=inputs,
        recipe=build(Recipe, flags),
        answerer=replace(build(AnswererSpec, flags), device=inputs.device),
    )
    if dry_run:
        _show_forecast(rollout.forecast(request), json)
        return
    execution = rollout.Execution(engine, workers, read_part(shard))
    with progress_bar("generate", "queries") as advance:
        outcome = rollout.generate(request, execution, advance)
    _show_outcome(outcome, json)


generate = with_flags(generate, Which, Inputs, Recipe, AnswererSpec, Request)


def read_part(text: str) -> tuple[int, int]:
    """``i/n`` as two numbers."""
    from lever_data.errors import UsageError

    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UsageError("--shard is i/n with 0 <= i < n", value=text, hint="--shard 0/8")
    return int(index), int(count)


def _show_forecast(forecast: Forecast, json: bool) -> None:
    from dataclasses import asdict

    if json:
        emit_json(asdict(forecast))
    elif forecast.already:
        print(f"already generated as {forecast.run}; nothing would be asked")
    else:
        print(
            f"{forecast.asked:,} answers would be asked for {forecast.candidates:,} candidates of "
            f"{forecast.queries:,} queries ({forecast.wanted:,} wanted, the rest is cached or "
            f"repeated); {forecast.shards:,} shards to do; run {forecast.run}"
        )


def _show_outcome(outcome: Outcome, json: bool) -> None:
    report, tally = outcome.report, outcome.tally
    for line in outcome.notices:
        notice(line)
    if json:
        name = outcome.run.run if outcome.run else None
        counts = {"asked": tally.asked, "cached": tally.hits, "missing_shards": outcome.missing}
        emit_json({"run": name, "already": outcome.already, **vars(report), **counts})
        return
    if outcome.run is None:
        print(f"{outcome.missing:,} shards are left to others; nothing is committed yet")
        return
    rows = max(report.candidates, 1)
    shares = ", ".join(
        f"{name} {count / rows:.1%}"
        for name, count in (
            ("file", report.file),
            ("fallback", report.fallback),
            ("failed", report.failed),
        )
    )
    head = "already generated as" if outcome.already else "generated"
    paid = "" if outcome.already else f"; {tally.asked:,} answers asked, {tally.hits:,} cached"
    print(
        f"{head} {outcome.run.run}: {report.candidates:,} candidates of {report.queries:,} "
        f"queries; {shares}{paid}"
    )
