"""``generate``: the whole rollout as one library call.

In go a :class:`Request` and how to run it; out comes an :class:`Outcome`. Shards are made by this
process or by Ray workers, in any order, and when all of them are there they become one run of kind
``rollout``. Whatever was finished before, by a killed call or by another machine, is not redone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import duckdb

from lever_data.errors import LeverError
from lever_data.items.prompts import Prompt
from lever_data.relations.db import run_sql
from lever_data.store.integrity import require_intact
from lever_data.store.schema import TABLES as SCHEMAS
from lever_data.store.schema import with_ids
from lever_data.store.store import Run
from lever_train.options.rollout import Execution, Request
from lever_train.rollout.answerers import images_of
from lever_train.rollout.answerers.base import Endpoint, template_of
from lever_train.rollout.ask import Tally, shared_beginnings, shown_first
from lever_train.rollout.job import Job, new_asker, shard_folder
from lever_train.rollout.ray_engine import Maker, Progress, make_with_ray
from lever_train.rollout.repeat import stored_prompts
from lever_train.rollout.resolve import resolve
from lever_train.rollout.shards import TABLES, Report, ShardFolder, ShardsGoneError
from lever_train.rollout.work import candidates_of, make_shard, prompts_of

FALLBACK_LIMIT = 0.1  # a larger share of fallback rows is called out
_MEASURED = 4096  # prompts whose beginnings are compared for a forecast
REPEATED_LIMIT, CUT_LIMIT = 0.05, 0.5  # so are larger ones of odd and of cut answers
FIRST = 3  # prompts that are asked before all others: where none succeeds, nothing else is paid for
STORED = 5  # stored answers that an endpoint is asked for again: is it still the same model?


@dataclass(frozen=True)
class Answers:
    """What the answers of a run are like: mean accuracy, shares that are empty and that repeat the
    prompt, and the commonest with their counts."""

    accuracy: float
    empty: float
    repeated: float
    commonest: list[tuple[str, int]]


@dataclass(frozen=True)
class Outcome:
    """What a call achieved. ``run`` ``None``: shards of other parts are still missing; ``answers``
    ``None``: no text was asked for. ``cut``: share of what was asked that ended at the token limit.
    """

    run: Run | None
    report: Report
    tally: Tally
    missing: int = 0
    already: bool = False
    notices: list[str] = field(default_factory=list)
    answers: Answers | None = None
    cut: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What a call would do: ``asked`` answers to pay for, of ``wanted`` in all, in ``shards``
    that are not done. With a budget ``asked`` counts the first round. ``prompts``: the first ones,
    as the answerer is shown them, and ``answers`` what it says, or why nothing. ``shared``: what of
    the prompts' text a cache of prefixes can serve, in [0, 1]."""

    queries: int
    candidates: int
    wanted: int
    asked: int
    shards: int
    run: str
    already: bool
    shared: float = 0.0
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


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
    if job.store.find(job.spec) is not None or (
        # the answerer of a Ray worker may need what this machine lacks
        execution.engine != "local" and not isinstance(job.answerer, Endpoint)
    ):
        return make_run(job, make_shard, execution, progress)
    before = _probe(job, execution)
    notices = _changed(job) if before.wanted and isinstance(job.answerer, Endpoint) else []
    outcome = make_run(job, make_shard, execution, progress)
    tally = outcome.tally
    tally.asked += before.asked
    tally.hits -= before.asked - before.failed  # where they were found again
    return replace(outcome, notices=[*notices, *outcome.notices])


def _probe(job: Job, execution: Execution) -> Tally:
    """Ask the first prompts end to end, before all others are paid for.

    Raises:
        LeverError: none is answered. With ``max_failed`` 1 that is for the rows to say.
    """
    folder, count = shard_folder(job), len(job.shards)
    missing = folder.missing(range(execution.part[0], count, execution.part[1]))
    if not missing:
        return Tally()
    part = job.shards[missing[0]]
    prompts = prompts_of(job, job.query_ids[part], candidates_of(job, part))[:FIRST]
    with folder.probing(missing[0]) as mine:
        if not mine:
            return Tally()
        asker = new_asker(job)
        asker.ask(prompts)
    if len(prompts) == FIRST and asker.tally.failed == FIRST and job.request.max_failed < 1:
        if len(folder.missing()) == count:
            folder.remove()  # it holds nothing
        raise LeverError(
            f"none of the first {FIRST} prompts was answered; nothing else was asked",
            value=asker.tally.commonest(),
            hint="mend the cause and run the same command again; --max-failed 1 goes on",
        )
    return asker.tally


def _changed(job: Job) -> list[str]:
    """A notice where a model of the same name now answers stored prompts otherwise."""
    stored = stored_prompts(job, STORED)
    again = job.answerer.answer([prompt for prompt, _ in stored])
    pairs = [(a.text, old) for a, (_, old) in zip(again, stored, strict=True) if a.text is not None]
    other = [(new, old) for new, old in pairs if new != old]
    if not other:
        return []
    new, old = other[0]
    return [
        f"WARNING: {job.label.scorer} answers {len(other)} of {len(pairs)} stored prompts "
        f"otherwise ({old!r} is {new!r} now): if it is another model, tell them apart with "
        "--scorer NAME"
    ]


def make_run(job: Job, make: Maker, execution: Execution, progress: Progress) -> Outcome:
    """Make what is missing of a job's shards and commit them once they are all there."""
    folder = shard_folder(job)
    if (run := job.store.find(job.spec)) is not None:
        folder.remove()  # a crash between the commit and this left it behind
        report = Report(**run.details["report"])
        return Outcome(run, report, Tally(), already=True, answers=answers_of(run))
    indices = list(range(execution.part[0], folder.count, execution.part[1]))
    folder.reopen(indices)
    if execution.engine == "ray":
        tally = make_with_ray(job, folder.missing(indices), make, execution, progress)
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
    answers, usage = answers_of(run), job.answerer.usage
    cut = usage.cut / max(usage.answers, 1)
    notices = [*_notices(report), *_notices_of_answers(answers, cut)]
    return Outcome(
        run, report, tally, already=run == job.before, notices=notices, answers=answers, cut=cut
    )


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


def forecast(request: Request, show: int = 0) -> Forecast:
    """How many answers :func:`generate` would ask for, and the words of the first ``show`` prompts
    with their answers; nothing but these is asked, and what they cost is kept."""
    job = resolve(request)
    folder = shard_folder(job)
    asker = new_asker(job)
    candidates = wanted = asked = 0
    template = template_of(request.answerer, job.scoring.task)
    shown, sent = list[Prompt](), list[Prompt]()
    words = template.shown if request.answerer.api == "chat" else template.text
    already = job.store.find(job.spec) is not None
    missing = [] if already else folder.missing()
    for index in missing:
        part = job.shards[index]
        proposals = candidates_of(job, part)
        prompts = prompts_of(job, job.query_ids[part], proposals)
        shown += prompts[: show - len(shown)]
        sent += sorted(prompts, key=shown_first)[: _MEASURED - len(sent)]
        candidates += len(proposals.row)
        wanted += len(prompts)
        asked += asker.missing(prompts)
    answered = asker.ask(shown) if shown else []
    return Forecast(
        queries=len(job.query_ids),
        candidates=candidates,
        wanted=wanted,
        asked=asked,
        shards=len(missing),
        run=job.spec.run_id(),
        already=already,
        shared=shared_beginnings([words(p) for p in sent]),
        prompts=tuple(words(p) for p in shown),
        answers=tuple(f"no answer: {a.error}" if a.text is None else a.text for _, a in answered),
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
            by = job.answerer.provenance()
            run = writer.commit({"report": vars(report), "answerer": by, "prompts": wording(job)})
    except ShardsGoneError:
        found = job.store.find(job.spec)
        if found is None:
            raise LeverError(
                "finished shards of this job vanished", where=folder.place.where
            ) from None
        return found
    folder.remove()
    return run


def wording(job: Job) -> dict[str, Any]:
    """How the prompts of a job are worded, for the record of its run: with these fields and the
    items of the store they can be read again, to the letter. ``api`` ``None``: the answerer reads
    no words; ``is_sent``: an endpoint gets them as they are, and no tokenizer joins the turns."""
    request, spec = job.request, job.request.answerer
    template = job.answerer.template  # not read again: the file of a system prompt may be gone
    if template is None:
        return {"api": None}
    root = images_of(spec, job.scoring.task, request.inputs.image_root, job.store.path)
    items = job.items if job.own else job.examples
    return {
        "api": spec.api,
        "is_sent": isinstance(job.answerer, Endpoint),
        "template": asdict(template),
        "candidate_split": next(item.split for item in items.values()),
        "image_root": None if root is None else str(root),
        "image_name": request.inputs.image_name,
    }


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


def answers_of(run: Run) -> Answers | None:
    """What the answers of a run are like; ``None`` where none was scored.

    An answer repeats the prompt where it begins as a prompt does, or holds the question or (eight
    letters or more) a beginning of it. What a base model writes after its answer does not count.
    """
    require_intact([run])
    con = duckdb.connect()
    candidates = run_sql(run, "candidates", "stg_candidates")
    counts = con.execute(
        f"""
        with answers as (
            select answer, score as accuracy,
                lower(trim(generation)) as said, lower(trim(question)) as question
            from ({candidates}) join ({run_sql(run, "queries", "stg_queries")})
                using (dataset, split, query_id)
            where answer is not null
        )
        select avg(accuracy), avg((answer = '')::int), avg((
            starts_with(said, 'question:')
            or contains(lower(answer), question)
            or (length(said) >= 8 and starts_with(question, said))
        )::int) from answers
        """
    ).fetchall()
    common = con.execute(
        f"select answer, count(*) from ({candidates}) "
        "where answer <> '' group by 1 order by 2 desc, 1 limit 3"
    ).fetchall()
    accuracy, empty, repeated = counts[0]
    return None if accuracy is None else Answers(accuracy, empty, repeated or 0.0, common)


def describe(job: Job, tally: Tally) -> str:
    """What was paid so far and what the cache saved, for the progress bar."""
    usage = job.answerer.usage
    tokens = usage.prompt_tokens + usage.completion_tokens
    paid = f"{tally.asked:,} asked" + (f" ({tokens:,} tokens)" if tokens else "")
    failed = f", {tally.failed:,} failed" if tally.failed else ""
    return f"{paid}, {tally.hits:,} cached{failed}"


def _notices_of_answers(answers: Answers | None, cut: float) -> list[str]:
    found = []
    if answers is not None and answers.repeated > REPEATED_LIMIT:
        found.append(
            f"WARNING: {answers.repeated:.1%} of the answers repeat the prompt: the model does not "
            "understand its form. Look at it with --dry-run --show 3"
        )
    if answers is not None and answers.empty > REPEATED_LIMIT:
        found.append(f"WARNING: {answers.empty:.1%} of the answers are empty")
    if cut > CUT_LIMIT:
        found.append(
            f"{cut:.1%} of the answers ended at the token limit (--max-new-tokens); a form of the "
            "prompt in which the model ends by itself costs less and scores better"
        )
    return found


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
