"""Rounds: rollout, training and a judgement, again and again, each asking where it can teach.

The first round asks about every training question; the later ones about those whose candidates are
still all equal and may well not stay so (view ``teachable``), with pointers of the newest selector
that were not tried. A round is judged on the training questions of a fold that is never asked about
(view ``held_out_fold``): where it gains nothing over the round before, the rounds end.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lever_data import connect
from lever_data.errors import LeverError, UsageError
from lever_data.store.files import write_atomic, write_json
from lever_data.store.store import Store
from lever_train.flow.foresight import require_answerer, require_inputs
from lever_train.flow.pipeline import Outputs, Step
from lever_train.flow.steps_learn import judge
from lever_train.flow.steps_make import answering, as_outputs, rollout_request
from lever_train.flow.training import (
    keyed,
    last_checkpoints,
    require_own,
    run_training,
    with_data,
)
from lever_train.flow.work import StepOutputs, Work
from lever_train.options.rollout import Recipe

FIRST, LATER, HELD_OUT = "training_folds", "teachable", "held_out_fold"
_BEFORE = ("ingest", "embed", "pool", "sft")


def rounds(work: Work) -> list[Step]:
    """The steps of all rounds, and at their end the choice, which is the step ``train``."""
    numbers = range(1, work.config.rounds.count + 1)
    found = [
        step for k in numbers for step in (_generate(work, k), _train(work, k), _judge(work, k))
    ]
    return [*found, _choose(work)]


def _is_over(known: StepOutputs, number: int) -> bool:
    """Whether a round before this one was the last."""
    return any(known.get(f"judge-{k}", {}).get("is_last") for k in range(1, number))


def _generate(work: Work, number: int) -> Step:
    table, limits = work.config.generate, work.config.rounds
    recipe = Recipe(**table.model_dump(include=set(Recipe.model_fields)))

    def act(known: StepOutputs, begun: bool) -> Outputs:
        from lever_train.rollout.generate import forecast, generate

        if _is_over(known, number):
            return {"answers": 0, "paths": []}
        request = rollout_request(work, known, recipe, table.shot_num, table.limit)
        paid = sum(known[f"generate-{k}"]["answers"] for k in range(1, number))
        if number == 1:
            _require_untaught(work, known)
            which = request.which.but(queries=FIRST)
            checkpoint = known.get("sft", {}).get("checkpoint")
            request = request.but(which=which, inputs=request.inputs.but(checkpoint=checkpoint))
            wanted = forecast(request).candidates
            if limits.budget is not None and wanted > limits.budget:
                raise UsageError(
                    "the first round alone would ask for more answers than the budget",
                    value=f"{wanted:,} of {limits.budget:,}",
                    hint="fewer candidates a query in [generate], or a larger [rounds] budget",
                )
        else:
            assert limits.budget is not None
            share = (limits.budget - paid) // (limits.count - number + 1)
            if share < 1:
                work.say(f"the budget of {limits.budget:,} answers is spent")
                return {"answers": 0, "paths": []}
            checkpoint = known[f"train-{number - 1}"]["checkpoint"]
            runs = tuple(known[f"generate-{k}"]["run"] for k in range(1, number))
            examples = tuple(known["ingest"]["examples"])
            which = request.which.but(target_view=LATER, runs=(*examples, *runs))
            inputs = request.inputs.but(checkpoint=checkpoint)
            request = request.but(which=which, inputs=inputs, budget=share)
        made = as_outputs(work, generate(request, progress=work.advance))
        rows = Store.open(work.config.data.store).run(made["run"]).details["report"]["candidates"]
        work.say(f"round {number}: {rows:,} answers, {paid + rows:,} in all")
        return made | {"answers": rows}

    parameters = {
        "generate": table.model_dump(mode="json"),
        "budget": limits.budget,
        "count": limits.count if number > 1 else 0,
        **answering(work),
    }
    after = _BEFORE if number == 1 else (*_BEFORE, f"generate-{number - 1}", f"judge-{number - 1}")
    guard = partial(require_answerer, work)
    return Step(f"generate-{number}", act, parameters, work.rollout_files(), after, guard=guard)


def _require_untaught(work: Work, known: StepOutputs) -> None:
    """Refuse data that trains on the questions which rounds are judged on.

    Raises:
        LeverError: it counts them.
    """
    made = known["ingest"]
    given = (*made["rl"], *made["beam"])
    if not given:
        return
    runs, reads = (*made["examples"], *given), (HELD_OUT, "stg_candidates", "stg_beams")
    with connect(work.config.data.store, runs=runs, only=reads) as con:
        taught, of = con.execute(_TAUGHT, [work.config.data.train_split]).fetchall()[0]
    if taught:
        raise LeverError(
            "the data given answers questions that rounds are judged on",
            value=f"{taught:,} of {of:,} questions of the view {HELD_OUT}",
            hint="give data of the view training_folds alone, or none: the first round asks",
        )


_TAUGHT = """
    with answered as (
        select dataset, split, query_id from stg_candidates
        union
        select dataset, split, query_id from stg_beams
    )

    select count(answered.query_id), count(*)
    from held_out_fold
    left join answered using (dataset, split, query_id)
    where held_out_fold.split = ?
"""


def _train(work: Work, number: int) -> Step:
    config, folder = work.config.train, work.out / "rounds" / str(number)

    def act(known: StepOutputs, begun: bool) -> Outputs:
        runs = [known[f"generate-{k}"].get("run") for k in range(1, number + 1)]
        if _is_over(known, number) or runs[-1] is None:
            return {"paths": []}
        start = known.get("sft", {}).get("checkpoint")
        training = with_data(work, known, config, start)
        used = (*known["ingest"]["rl"], *(run for run in runs if run is not None))
        made = last_checkpoints(run_training(work, folder, training, used, begun))
        paths = [str(path) for path in made.values()]
        return {"checkpoint": paths[-1], "paths": paths, **{n: str(p) for n, p in made.items()}}

    reads = work.training_files() | work.view_files()
    after: tuple[str, ...] = (*_BEFORE, f"generate-{number}")
    if number > 1:
        after = (*after, f"judge-{number - 1}")

    def guard() -> None:
        require_inputs(work, work.config.data.train_split)
        require_own(folder)

    return Step(f"train-{number}", act, keyed(config), reads, after, guard=guard)


def _judge(work: Work, number: int) -> Step:
    """The round's selector beside the one of the round before, on the held-out questions."""
    limit = work.config.rounds.p

    def act(known: StepOutputs, begun: bool) -> Outputs:
        if _is_over(known, number):
            return {"is_last": True, "paths": []}
        if "checkpoint" not in known[f"train-{number}"]:
            return {"is_last": True, "paths": []}
        names = [k for k in (number - 1, number) if k > 0]
        named = {f"round {k}": Path(known[f"train-{k}"]["checkpoint"]) for k in names}
        board = judge(work, known, named, queries=HELD_OUT).scoreboard
        file = work.out / "rounds" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, board.to_json())
        pairs = [
            p for p in board.paired if (p.a, p.b) == (f"round {number}", f"round {number - 1}")
        ]
        gain = min(pairs, key=lambda pair: pair.shots, default=None)
        is_last = gain is not None and not (gain.difference > 0 and gain.p < limit)
        if gain is not None:
            said = "nothing beyond chance: the rounds end" if is_last else "a gain"
            work.say(
                f"round {number}: {100 * gain.difference:+.1f} points over round {number - 1} "
                f"(p {gain.p:.2g}, {gain.n:,} held-out questions), {said}"
            )
        return {"is_last": is_last, "json": str(file), "paths": [str(file)]}

    parameters = {"figures": work.config.eval.figures.model_dump(), "p": limit, **answering(work)}
    after: tuple[str, ...] = (*_BEFORE, f"train-{number}")
    if number > 1:
        after = (*after, f"train-{number - 1}", f"judge-{number - 1}")
    return Step(f"judge-{number}", act, parameters, work.rollout_files(), after)


def _choose(work: Work) -> Step:
    """The checkpoints of the last round that gained something, where those of a training lie."""

    def act(known: StepOutputs, begun: bool) -> Outputs:
        chosen = 1
        for number in range(2, work.config.rounds.count + 1):
            if known[f"judge-{number}"]["is_last"]:
                break
            chosen = number
        made = known[f"train-{chosen}"]
        work.say(f"round {chosen} is the result")
        work.checkpoints.mkdir(parents=True, exist_ok=True)
        copies: Outputs = {}
        for name in ("rce", "grpo", "checkpoint"):
            if name in made:
                source = Path(made[name])
                copies[name] = str(work.checkpoints / source.name)
                write_atomic(Path(copies[name]), source.read_bytes())
        return copies | {"paths": list(dict.fromkeys(copies.values()))}

    numbers = range(1, work.config.rounds.count + 1)
    after = tuple(f"{name}-{k}" for k in numbers for name in ("train", "judge"))
    return Step("train", act, {"folder": str(work.checkpoints)}, after=after)
