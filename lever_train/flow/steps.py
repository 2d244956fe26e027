"""The steps of the pipeline: what each does, what it depends on, and when there is nothing to do.

In goes a :class:`PipelineConfig`; out come :class:`Step` records in order: ingest, embed, pool,
beam, sft, generate, audit, train, convert, evaluate. Each calls the library verb of its command.
"""

from __future__ import annotations

from dataclasses import replace

from lever_train.flow import steps_learn, steps_make
from lever_train.flow.pipeline import Say, Step
from lever_train.flow.steps_rounds import rounds
from lever_train.flow.work import Work
from lever_train.learn.train import Advance
from lever_train.options.pipeline import PipelineConfig

_LEARNING = ("beam", "sft", "generate", "audit", "train", "convert")


def build_steps(config: PipelineConfig, say: Say, advance: Advance) -> list[Step]:
    """The steps of a config.

    Raises:
        UsageError: there is neither RL data nor what is needed to generate it.
    """
    work = Work(config, say, advance)
    steps = [
        steps_make.ingest(work),
        steps_make.embed(work),
        steps_make.pool(work),
        steps_make.beam(work),
        steps_learn.sft(work),
        *_learning(work),
        steps_learn.convert(work),
        steps_learn.evaluate(work),
    ]
    if config.eval.checkpoint is None:
        return steps
    idle = f"nothing is trained: {config.eval.checkpoint} is evaluated"
    return [replace(step, idle=idle) if step.name in _LEARNING else step for step in steps]


def _learning(work: Work) -> list[Step]:
    """One rollout, its audit and one training; or rounds of them."""
    if work.config.rounds.count:
        return rounds(work)
    return [steps_make.generate(work), steps_learn.audit(work), steps_learn.train(work)]
