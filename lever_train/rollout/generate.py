"""``generate``: the whole rollout as one library call.

In go a :class:`Request` and how to run it; out comes an :class:`Outcome`. Shards are made by this
process or by Ray workers, in any order, and when all of them are there they become one run of kind
``rollout``. Whatever was finished before, by a killed call or by another machine, is not redone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lever_data.errors import LeverError
from lever_data.store.schema import TABLES as SCHEMAS
from lever_data.store.schema import with_ids
from lever_data.store.store import Run
from lever_train.options.rollout import Execution, Request
from lever_train.rollout.ask import Talk, Tally
from lever_train.rollout.job import Job, new_asker, resolve, shard_folder
from lever_train.rollout.ray_engine import make_with_ray
from lever_train.rollout.shards import TABLES, Report, ShardFolder, ShardRows, ShardsGoneError
from lever_train.rollout.work import candidates_of, make_shard, prompts_of

Progress = Callable[[float, float | None, str], None]
Maker = Callable[[Job, slice], Talk[ShardRows]]
FALLBACK_LIMIT = 0.1  # a larger share of fallback rows is called out


@dataclass(frozen=True)
class Outcome:
    """What a call achieved. ``run`` ``None``: shards of other parts are still missing."""

    run: Run | None
    report: Report
    tally: Tally
    missing: int = 0
    already: bool = False
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Forecast:
    """What a call would do: ``asked`` answers to pay for, of ``wanted`` in all, in ``shards``
    that are not done. With a budget ``asked`` counts the first round."""

    queries: int
    candidates: int
    wanted: int
    asked: int
    shards: int
    run: str
    already: bool


def generate(
    request: Request,
    execution: Execution | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Outcome:
    """Make what is missing of a rollout and commit it once it is whole.

    Raises:
        LeverError: the request does not fit the store, an endpoint is down, a disk is full. What
            was finished stays; the same call goes on from there.
    """
    execution = execution or Execution()
    job = resolve(request, computes=execution.engine == "local")
    return make_run(job, make_shard, execution, progress)


def make_run(job: Job, make: Maker, execution: Execution, progress: Progress) -> Outcome:
    """Make what is missing of a job's shards and commit them once they are all there."""
    folder = shard_folder(job)
    if (run := job.store.find(job.spec)) is not None:
        folder.remove()  # a crash between the commit and this left it behind
        return Outcome(run, Report(**run.details["report"]), Tally(), already=True)
    indices = list(range(execution.part[0], folder.count, execution.part[1]))
    folder.reopen(indices)
    if execution.engine == "ray":
        tally = make_with_ray(job, folder.missing(indices), execution, progress)
    else:
        tally = _make_here(job, folder, indices, make, progress)
    missing = folder.missing()
    if (run := job.store.find(job.spec)) is not None:
        folder.remove()  # another process committed while this one waited for its shards
    elif missing:
        return Outcome(None, folder.report(), tally, missing=len(missing))
    else:
        run = _close(job, folder, tally)
    report = Report(**run.details["report"])
    return Outcome(run, report, tally, already=run == job.before, notices=_notices(report))


def _close(job: Job, folder: ShardFolder, tally: Tally) -> Run:
    """Commit a complete set of shards, unless it holds nothing or nothing new.

    Raises:
        LeverError: no answer succeeded.
    """
    report = folder.report()
    if report.failed and report.failed >= report.candidates:
        folder.remove()
        raise LeverError(
            f"all {report.failed:,} answers failed; nothing is committed",
            value=tally.commonest() or None,
            hint="mend the cause and run the same command again",
        )
    if job.before is not None and report.failed >= job.before.details["report"]["failed"]:
        folder.remove()  # asked again, and failed again
        return job.before
    return commit(job, folder)


def forecast(request: Request) -> Forecast:
    """How many answers :func:`generate` would ask for; nothing is written or asked."""
    job = resolve(request)
    folder = shard_folder(job)
    asker = new_asker(job)
    candidates = wanted = asked = 0
    already = job.store.find(job.spec) is not None
    missing = [] if already else folder.missing()
    for index in missing:
        part = job.shards[index]
        proposals = candidates_of(job, part)
        prompts = prompts_of(job, job.query_ids[part], proposals)
        candidates += len(proposals.row)
        wanted += len(prompts)
        asked += asker.missing(prompts)
    return Forecast(
        len(job.query_ids), candidates, wanted, asked, len(missing), job.spec.run_id(), already
    )


def commit(job: Job, folder: ShardFolder) -> Run:
    """Turn a complete set of shards into a run and delete them.

    Of several processes that come here at once one commits; the others find its run.
    """
    try:
        report = folder.report()
        with job.store.begin(job.spec) as writer:
            for table in TABLES:
                shape = with_ids(SCHEMAS[table], job.items.values())
                for rows in folder.tables(table, shape):
                    writer.write(table, rows)
            run = writer.commit({"report": vars(report)})
    except ShardsGoneError:
        found = job.store.find(job.spec)
        if found is None:
            raise LeverError(
                "finished shards of this job vanished", where=str(folder.folder)
            ) from None
        return found
    folder.remove()
    return run


def _make_here(
    job: Job, folder: ShardFolder, indices: list[int], make: Maker, progress: Progress
) -> Tally:
    shards = job.shards
    total = float(sum(shards[i].stop - shards[i].start for i in indices))
    todo = folder.missing(indices)
    done = total - sum(shards[i].stop - shards[i].start for i in todo)
    asker = new_asker(job, lambda tally: progress(done, total, describe(job, tally)))
    progress(done, total, "")
    for index in folder.make_all(todo, lambda i: make(job, shards[i]), asker):
        done += shards[index].stop - shards[index].start
        progress(done, total, describe(job, asker.tally))
    return asker.tally


def describe(job: Job, tally: Tally) -> str:
    """What was paid so far and what the cache saved, for the progress bar."""
    usage = job.answerer.usage
    tokens = usage.prompt_tokens + usage.completion_tokens
    paid = f"{tally.asked:,} asked" + (f" ({tokens:,} tokens)" if tokens else "")
    failed = f", {tally.failed:,} failed" if tally.failed else ""
    return f"{paid}, {tally.hits:,} cached{failed}"


def _notices(report: Report) -> list[str]:
    found = []
    rows = max(report.candidates, 1)
    if report.fallback / rows > FALLBACK_LIMIT:
        found.append(
            f"WARNING: {report.fallback / rows:.1%} of the rows were scored by string matching "
            "(fallback), not by the official metric. Give --questions and --annotations of the "
            "right split, or train on a *_file_only view."
        )
    if report.failed:
        found.append(
            f"{report.failed:,} answers failed; their rows say why (eval_failed, error) and stay "
            "out of the training views. The same command again asks them anew"
        )
    return found
