"""Steps that learn and judge: SFT, the audit gate, RCE and GRPO, the legacy format, evaluation.

Each function takes the :class:`Work` of the pipeline and returns one :class:`Step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lever_data.store.files import write_json, write_text
from lever_train.flow.foresight import require_answerer, require_inputs
from lever_train.flow.pipeline import Outputs, Step
from lever_train.flow.training import (
    keyed,
    last_checkpoints,
    require_own,
    run_training,
    sft_config,
    with_data,
)
from lever_train.flow.work import StepOutputs, Work, given
from lever_train.options.evaluate import Contest, EvalRequest, Questions
from lever_train.selector.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from lever_train.evaluate.api import Evaluation


def sft(work: Work) -> Step:
    """The checkpoint RL starts from, trained on InfoScore beams where none is given."""
    table, config = work.config.sft, sft_config(work.config)

    def act(known: StepOutputs, begun: bool) -> Outputs:
        if work.has_sft:
            return {"checkpoint": str(table.checkpoint), "paths": [str(table.checkpoint)]}
        training = with_data(work, known, config, None)
        found = run_training(work, work.out / "sft", training, work.beam_runs(known), begun)
        # by its validation loss: beams are few, and later epochs only learn them by heart
        return {"checkpoint": str(found.best), "paths": [str(found.best)]}

    off = not work.has_sft and not table.enabled
    idle = "turned off: RL starts from a fresh selector" if off else None
    parameters = {} if work.has_sft else keyed(config)
    reads = given(sft_checkpoint=table.checkpoint) if work.has_sft else work.training_files()
    after = ("ingest", "embed", "pool", "beam")

    def guard() -> None:
        if work.has_sft and table.checkpoint is not None:
            read_checkpoint(table.checkpoint)
        else:
            require_own(work.out / "sft")

    return Step("sft", act, parameters, reads, after, idle=idle, guard=guard)


def audit(work: Work) -> Step:
    """What the training view can teach; stops the pipeline where a gate says so."""
    from lever_data.report.audit import audit_views
    from lever_data.report.audit_page import audit_page
    from lever_data.report.gate import parse_gate, require_passed
    from lever_data.report.options import AuditRequest

    config = work.config

    def act(known: StepOutputs, begun: bool) -> Outputs:
        request = AuditRequest(
            reward=config.train.reward,
            runs=work.rl_runs(known),
            sql_dir=config.data.sql_dir,
        )
        found = audit_views(config.data.store, request, config.train.data.view)
        page, figures = work.out / "audit.html", work.out / "audit.json"
        work.out.mkdir(parents=True, exist_ok=True)
        write_text(page, audit_page(found))
        write_json(figures, [one.figures for one in found])
        require_passed([parse_gate(g) for g in config.audit.fail_on], [a.figures for a in found])
        return {"html": str(page), "json": str(figures), "paths": [str(page), str(figures)]}

    parameters = {
        "fail_on": list(config.audit.fail_on),
        "view": list(config.train.data.view),
        "reward": config.train.reward.model_dump(),
    }
    return Step("audit", act, parameters, work.view_files(), ("ingest", "generate"))


def train(work: Work) -> Step:
    """RCE, then GRPO where it has epochs."""
    config = work.config.train

    def act(known: StepOutputs, begun: bool) -> Outputs:
        start = known.get("sft", {}).get("checkpoint")
        training = with_data(work, known, config, start)
        result = run_training(work, work.checkpoints, training, work.rl_runs(known), begun)
        made = {name: str(path) for name, path in last_checkpoints(result).items()}
        checkpoint = list(made.values())[-1]
        outputs: Outputs = {"checkpoint": checkpoint, "paths": list(made.values()), **made}
        curves = work.checkpoints / "curves.html"
        return outputs | ({"curves": str(curves)} if curves.exists() else {})

    reads = work.training_files() | work.view_files()
    after = ("ingest", "embed", "pool", "sft", "generate", "audit")

    def guard() -> None:
        require_inputs(work, work.config.data.train_split)
        require_own(work.checkpoints)

    return Step("train", act, keyed(config), reads, after, guard=guard)


def convert(work: Work) -> Step:
    """The trained selector in the older format, for the legacy evaluation."""
    from lever_train.selector.checkpoint import convert as library
    from lever_train.selector.checkpoint import not_in_v2format

    def act(known: StepOutputs, begun: bool) -> Outputs:
        path, _ = library(Path(known["train"]["checkpoint"]), None)
        return {"checkpoint": str(path), "paths": [str(path)]}

    idle = not_in_v2format(work.config.train.model.selector)
    return Step("convert", act, after=("train",), idle=idle)


def evaluate(work: Work) -> Step:
    """SFT, RCE and GRPO beside the baselines on the eval split."""
    from lever_train.evaluate.predictions import write_results
    from lever_train.evaluate.scoreboard_page import scoreboard_page

    data, table, answerer = work.config.data, work.config.eval, work.config.answerer

    def act(known: StepOutputs, begun: bool) -> Outputs:
        named = {
            "sft": known.get("sft", {}).get("checkpoint"),
            "rce": known["train"].get("rce"),
            "rce+grpo": known["train"].get("grpo"),
            "dense": known["train"].get("dense"),
        }
        if table.checkpoint is not None:
            named = {table.checkpoint.stem: table.checkpoint}
        found = judge(work, known, {n: Path(path) for n, path in named.items() if path is not None})
        for line in found.notices:
            work.say(line)
        files = [work.out / "eval.json", work.out / "eval.html"]
        write_json(files[0], found.scoreboard.to_json())
        write_text(files[1], scoreboard_page(found.scoreboard))
        if table.predictions is not None:
            files += write_results(found.outcomes, found.question_ids, table.predictions)
        paths = [str(path) for path in files]
        return {"json": paths[0], "html": paths[1], "run": found.scoreboard.run, "paths": paths}

    idle = None
    if data.eval_questions is None and data.eval_items is None:
        idle = "no eval_questions and eval_annotations are given, and no eval_items"
    elif not work.embeds(data.eval_split) and data.eval_embeddings is None:
        idle = "no eval_embeddings are given"
    parameters = {
        "eval": table.figures.model_dump(),
        "answerer": answerer.answerer.model_dump(mode="json"),
        "image_root": _text(data.image_root),
        "image_name": data.image_name,
        "task": None,
        **work.task(),
    }
    if table.predictions is not None:
        parameters["predictions"] = str(table.predictions)
    after = ("ingest", "embed", "pool", "sft", "train")

    def guard() -> None:
        require_answerer(work)
        if table.checkpoint is not None:
            read_checkpoint(table.checkpoint)
        if data.eval_split != data.train_split:
            require_inputs(work, data.eval_split)

    reads = work.evaluation_files()
    return Step("evaluate", act, parameters, reads, after, idle=idle, guard=guard)


def judge(
    work: Work,
    known: StepOutputs,
    checkpoints: Mapping[str, Path],
    *,
    queries: str | None = None,
) -> Evaluation:
    """Evaluate checkpoints by name on the eval split; on the training questions of a view where
    ``queries`` names one."""
    from lever_train.evaluate.api import run_evaluation

    data, answerer = work.config.data, work.config.answerer
    query, candidate, held_out = work.embeddings(known)
    own = queries is not None
    request = EvalRequest(
        store=data.store,
        checkpoints=tuple(checkpoints.values()),
        questions=Questions(
            dataset=data.dataset,
            split=data.train_split if own else data.eval_split,
            queries=queries,
            candidate_split=data.train_split,
            query_embeddings=query if own else held_out,
            candidate_embeddings=candidate,
            pool=work.pools(known)[0 if own else 1],
            questions=data.questions if own else data.eval_questions,
            annotations=data.annotations if own else data.eval_annotations,
            image_root=data.image_root,
            image_name=data.image_name,
            task=work.config.given_task,
        ),
        contest=Contest(
            **work.config.eval.figures.model_dump(),
            device=work.config.train.run.device,
            answerer_query_embeddings=_text(
                answerer.candidate_embeddings if own else answerer.query_embeddings
            ),
            answerer_candidate_embeddings=_text(answerer.candidate_embeddings),
        ),
        answerer=answerer.answerer,
        names=tuple(checkpoints),
    )
    return run_evaluation(request, work.advance)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
