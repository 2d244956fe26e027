"""``lever generate``: propose candidates, have them answered and scored, store them as a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lever_data.options import words
from lever_data.vocabulary import DryRun, JsonFile
from lever_train.options.rollout import Execution, Request

from .common import emit, notice, progress_bar, say
from .flags import with_flags

if TYPE_CHECKING:
    from lever_train.rollout.generate import Forecast, Outcome


Show = Annotated[
    int,
    words(
        "With --dry-run: ask the first N prompts and print them with their answers.",
        metavar="N",
        ge=0,
    ),
]


@with_flags
def generate(
    request: Request,
    execution: Execution,
    dry_run: DryRun = False,
    show: Show = 0,
    repeat_sample: Annotated[
        int,
        words(
            "Only ask N stored prompts of this scorer again, and say how the answers differ.",
            metavar="N",
            ge=0,
        ),
    ] = 0,
    json: JsonFile = None,
) -> None:
    """Generate RL data: propose candidates, have them answered, score the answers.

    Finished shards are kept: after a crash the same command goes on and ends with the same bytes.
    """
    from lever_train.rollout.answerers.outages import knock

    knock(request.answerer.spec)  # before torch is imported: its seconds are waited for the server
    from lever_train.rollout import generate as rollout

    if dry_run:
        _show_forecast(rollout.forecast(request, show), json)
        return
    if show:
        from lever_data.errors import UsageError

        raise UsageError("--show goes with --dry-run", value=show)
    if repeat_sample:
        _show_repeat(request, repeat_sample, json)
        return
    with progress_bar("generate", "queries") as advance:
        outcome = rollout.generate(request, execution, advance)
    _show_outcome(outcome, json)


def _show_repeat(request: Request, count: int, json: Path | None) -> None:
    from dataclasses import asdict

    from lever_train.rollout.repeat import repeat

    found = repeat(request, count)
    if emit(asdict(found), json):
        return
    share = f", {found.noise / found.within:.0%} of it" if found.within else ""
    within = "-" if found.within is None else f"{found.within:.4g}"
    print(
        f"{found.asked:,} prompts asked again, {found.failed:,} failed, {found.changed:,} answered "
        f"in other words\nvariance of the accuracy between two answers to one prompt: "
        f"{found.noise:.4g}{share}\nvariance among the candidates of a query: {within}"
    )


def _show_forecast(forecast: Forecast, json: Path | None) -> None:
    from dataclasses import asdict

    if emit(asdict(forecast), json):
        return
    shown = zip(forecast.prompts, forecast.answers, strict=True)
    for number, (prompt, answer) in enumerate(shown, 1):
        print(f"-- prompt {number}\n{prompt}\n-- answer {number}\n{answer}\n--")
    if forecast.already:
        print(f"already generated as {forecast.run}; nothing would be asked")
    else:
        say(
            f"{forecast.asked:,} answers would be asked for {forecast.candidates:,} candidates of "
            f"{forecast.queries:,} queries ({forecast.wanted:,} wanted, the rest is cached or "
            f"repeated); {forecast.shards:,} shards to do; run {forecast.run}"
        )
        print(f"a cache of prefixes can serve {forecast.shared:.0%} of the prompts' text")


def _show_outcome(outcome: Outcome, json: Path | None) -> None:
    report, tally = outcome.report, outcome.tally
    for line in outcome.notices:
        notice(line)
    name = outcome.run.run if outcome.run else None
    counts = {"asked": tally.asked, "cached": tally.hits, "missing_shards": outcome.missing}
    answers = {} if outcome.answers is None else vars(outcome.answers) | {"cut": outcome.cut}
    if emit({"run": name, "already": outcome.already, **vars(report), **counts, **answers}, json):
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
    say(
        f"{head} {outcome.run.run}: {report.candidates:,} candidates of {report.queries:,} "
        f"queries; {shares}{paid}"
    )
    if outcome.answers is not None:
        said = outcome.answers
        cut = "" if outcome.already else f", cut {outcome.cut:.1%}"
        common = ", ".join(f"{answer} ({count:,})" for answer, count in said.commonest)
        say(f"accuracy {said.accuracy:.1%}; empty {said.empty:.1%}{cut}; commonest: {common}")
