"""The training: one loop for every stage, resumable at any step.

In go a store, a config and an output folder; out come checkpoints the legacy code can load,
metrics, the resolved config and the provenance. A stage is a function in ``objectives.py``; this
file only walks over phases, epochs and batches, and keeps the state.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lever_data.errors import LeverError
from lever_train import distributed
from lever_train.batch import Share
from lever_train.checkpoint import Progress
from lever_train.config import TrainConfig
from lever_train.data import Source, TrainingData, open_data
from lever_train.interrupt import Interrupt
from lever_train.loader import Loader, Position
from lever_train.objectives import Settings
from lever_train.options import to_toml
from lever_train.outputs import prepare, write_checkpoint, write_description, write_metrics
from lever_train.schedule import adapt_beta, rce_temperature, warm_up
from lever_train.selector import Selector
from lever_train.setup import Phase, frozen_copy, new_selector, phases_of, set_trained
from lever_train.state import State, load_state, save_state
from lever_train.step import Figures, Stepper
from lever_train.validate import validate

HIGHER_IS_BETTER = {"reward": True, "accuracy": True, "expected_reward": True, "loss": False}
SELECT_BY = {
    "reward": "val_pick_reward",
    "accuracy": "val_pick_accuracy",
    "expected_reward": "val_expected_reward",
    "loss": "val_loss",
}


class Advance(Protocol):
    """Where progress is reported: work done and in all, and a note."""

    def __call__(self, done: float, total: float | None, note: str = "") -> None:
        """Report ``done`` of ``total`` groups."""


@dataclass(frozen=True)
class TrainRequest:
    """One training. ``notify`` gets one line for people, ``advance`` the groups done."""

    source: Source
    out: Path
    config: TrainConfig
    resume: bool = False
    overwrite: bool = False
    notify: Callable[[str], None] = lambda line: None
    advance: Advance = lambda done, total, note="": None


@dataclass(frozen=True)
class TrainResult:
    """What a training left: its last checkpoint and the best by validation, the figures of every
    epoch, and the groups and seconds this process spent in training steps."""

    out: Path
    last: Path
    best: Path
    epochs: list[dict[str, Any]]
    groups: int
    seconds: float


def train(request: TrainRequest) -> TrainResult:
    """Run a training, or the rest of one, to its end.

    Raises:
        LeverError: the data, the checkpoint or the state does not fit, or a loss is not finite.
        KeyboardInterrupt: it was asked to stop; the state is saved.
    """
    world = distributed.join(request.config.run.device)
    try:
        with Interrupt() as interrupt:
            return _Training(request, world, interrupt).run()
    finally:
        distributed.leave(world)


@dataclass
class _Clock:
    groups: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, groups: int) -> None:
        now = time.perf_counter()
        self.groups += groups
        self.seconds += now - self.started
        self.started = now


class _Training:
    def __init__(
        self, request: TrainRequest, world: distributed.World, interrupt: Interrupt
    ) -> None:
        self.request, self.config = request, request.config
        self.world, self.interrupt = world, interrupt
        self.clock = _Clock()
        if self.config.run.threads is not None:
            torch.set_num_threads(self.config.run.threads)
        self.phases = phases_of(self.config)
        if world.is_main:
            prepare(request.out, resume=request.resume, overwrite=request.overwrite)
        self.data = open_data(request.source, self.config)
        self._report_data()
        self.device = torch.device(self.config.run.device)
        self.selector, self.config = new_selector(
            self.config, self.data.queries.shape[1], self._say
        )
        self.selector.to(self.device)
        self.loader = Loader(
            self.data,
            self.device,
            batch_size=self.config.run.batch_size,
            shot_num=self.config.data.shot_num,
            share=Share(world.rank, world.size),
        )
        self.state = self._first_state()

    def run(self) -> TrainResult:
        config, request = self.config, self.request
        if self.world.is_main:
            write_description(request.out, config, self.data.provenance)
        self._say(to_toml(config).rstrip())
        optimizer_state = self.state.optimizer
        for number in range(self.state.phase, len(self.phases)):
            self._run_phase(number, self.phases[number], optimizer_state)
            optimizer_state = {}
        if config.run.stage == "rl" and config.grpo.epochs == 0:
            self._say("[GRPO] epochs=0: the RCE model is the result")
        self._write_metrics()
        return self._result()

    def _run_phase(self, number: int, phase: Phase, optimizer_state: dict[str, Any]) -> None:
        self._say(phase.describe(self.config))
        for line in set_trained(self.selector, phase, self.config):
            self._say(line)
        if phase.name == "grpo" and "rce" not in self.state.references:
            self.state.references["rce"] = dict(frozen_copy(self.selector).state_dict())
        stepper = Stepper(phase.name, number, self.selector, self.loader, self.config, self.world)
        if optimizer_state:
            stepper.optimizer.load_state_dict(optimizer_state)
        reference = self._reference() if phase.name == "grpo" else None
        while self.state.epoch < phase.epochs:
            self._run_epoch(phase, stepper, reference)
        self._move_on(number + 1)

    def _move_on(self, phase: int) -> None:
        self.state.phase, self.state.epoch = phase, 0
        self.state.groups, self.state.step = 0, 0
        self._save({})

    def _run_epoch(self, phase: Phase, stepper: Stepper, reference: Selector | None) -> None:
        state, config = self.state, self.config
        epoch = state.epoch + 1
        total_steps = self._steps_per_epoch() * phase.epochs
        position = Position(
            config.data.order, config.run.seed, phase.first_epoch + state.epoch, state.groups
        )
        self.clock.started = time.perf_counter()
        for batch in self.loader.batches(self.data.train, position):
            settings = self._settings(phase, total_steps, reference)
            factor = (
                warm_up(state.step, total_steps, config.sft.warm_up) if phase.name == "sft" else 1
            )
            figures = stepper.step(batch, settings, state.step, factor)
            state.log.step(phase.name, epoch, state.step, figures | phase.settings(settings))
            self._after_step(phase, figures, stepper)
        self._end_epoch(phase, epoch, stepper)

    def _after_step(self, phase: Phase, figures: Figures, stepper: Stepper) -> None:
        state, config = self.state, self.config
        groups = int(figures["groups"])
        state.step += 1
        state.groups += groups
        if phase.name == "grpo" and config.grpo.kl_adaptive and not math.isnan(figures["kl"]):
            low, high = config.grpo.kl_target_min, config.grpo.kl_target_max
            state.beta = adapt_beta(figures["kl"], state.beta, low, high)
        self.clock.add(groups)
        rate = self.clock.groups / max(self.clock.seconds, 1e-9)
        self.request.advance(
            state.groups,
            self.data.census.groups,
            f"{phase.name} {state.epoch + 1}/{phase.epochs}  {rate:,.0f} queries/s  "
            f"loss {figures['loss']:.4f}",
        )
        stop = self.interrupt.agreed(self.world)
        if stop or state.step % config.run.save_every == 0:
            self._save(stepper.optimizer.state_dict())
        if stop:
            self._say(f"stopped; the state is saved: --resume goes on from step {state.step}")
            raise KeyboardInterrupt

    def _end_epoch(self, phase: Phase, epoch: int, stepper: Stepper) -> None:
        state, log = self.state, self.state.log
        means = log.mean(phase.name, epoch, "weight")
        figures = {
            f"train_{n}": v for n, v in means.items() if n not in ("groups", "tied", "weight")
        }
        for name in ("groups", "tied"):
            figures[name] = log.total(phase.name, epoch, name)
        if "train_loss" not in figures:
            raise LeverError(
                "every group is tied: there is nothing to learn from",
                where=", ".join(self.config.data.view),
                value=f"{figures['tied']:,.0f} of {figures['groups']:,.0f} groups",
                hint="--tied-groups keep trains on them all the same; another reward may tell "
                "the candidates apart",
            )
        if self.data.validation is not None:
            figures |= validate(
                self.selector, self.loader, self.data.validation, self.config, self.world
            )
        log.epoch(phase.name, epoch, figures)
        is_best = self._note_best(phase.name, epoch, figures)
        progress = Progress(epoch, phase.name, state.beta, figures)
        if self.world.is_main:
            path = write_checkpoint(self.request.out, self.selector, progress, is_best)
            self._say(f"wrote {path}")
        state.epoch, state.groups = epoch, 0
        self._save(stepper.optimizer.state_dict())
        self._write_metrics()

    def _note_best(self, phase: str, epoch: int, figures: Figures) -> bool:
        """Whether this epoch is the best so far; without validation the last is."""
        kind = self.config.run.select_by
        value = figures.get(SELECT_BY[kind], math.nan)
        if self.data.validation is not None and SELECT_BY[kind] not in figures:
            kind, value = "loss", figures["val_loss"]  # sft has no rewards to compare
        sign = 1 if HIGHER_IS_BETTER[kind] else -1
        best = self.state.best
        if best is not None and not math.isnan(value) and sign * value <= sign * best[1]:
            return False
        self.state.best = (f"{phase}_epoch{epoch}.pt", value)
        return True

    def _settings(self, phase: Phase, total: int, reference: Selector | None) -> Settings:
        options, rce = self.config.grpo, self.config.rce
        if phase.name == "rce":
            start, end = rce.temperature_start, rce.temperature_end
            return Settings(temperature=rce_temperature(self.state.step, total, start, end))
        early = self.state.epoch < options.early_epochs
        top_k = options.early_top_k if early else options.late_top_k
        return Settings(beta=self.state.beta, top_k=top_k or None, reference=reference)

    def _reference(self) -> Selector:
        reference = frozen_copy(self.selector)
        reference.load_state_dict(self.state.references[self.config.grpo.reference])
        return reference

    def _steps_per_epoch(self) -> int:
        return math.ceil(self.data.census.groups / self.config.run.batch_size)

    def _first_state(self) -> State:
        fingerprint = _fingerprint(self.config, self.data, self.world.size)
        if self.request.resume:
            state = load_state(self.request.out, fingerprint)
            self.selector.load_state_dict(state.selector)
            self._say(
                f"resuming: phase {state.phase + 1}, epoch {state.epoch + 1}, step {state.step}"
            )
            return state
        state = State(fingerprint, beta=self.config.grpo.kl_beta_init)
        if any(phase.name == "grpo" for phase in self.phases):
            state.references["sft"] = dict(frozen_copy(self.selector).state_dict())
        return state

    def _save(self, optimizer: dict[str, Any]) -> None:
        self.state.selector = dict(self.selector.state_dict())
        self.state.optimizer = optimizer
        if self.world.is_main:
            save_state(self.request.out, self.state)

    def _write_metrics(self) -> None:
        if self.world.is_main:
            write_metrics(self.request.out, self.state.log.table())

    def _result(self) -> TrainResult:
        out = self.request.out
        assert self.state.best is not None
        return TrainResult(
            out=out,
            last=out / "last.pt",
            best=out / self.state.best[0],
            epochs=self.state.log.epochs(),
            groups=self.clock.groups,
            seconds=self.clock.seconds,
        )

    def _report_data(self) -> None:
        for line in describe_data(self.data):
            self._say(line)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            self.request.notify(line)


_FREE = {"threads", "save_every", "tensorboard", "memory_limit"}  # what changes no result


def _fingerprint(config: TrainConfig, data: TrainingData, processes: int) -> dict[str, str]:
    """What must be the same for a resumed training to end as the uninterrupted one would."""
    found = {"processes": str(processes)}
    for section, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            if name not in _FREE:
                found[f"[{section}] {name}"] = repr(value)
    for name, value in data.provenance.items():
        found[name] = repr(value)
    for name in ("queries", "candidates"):
        vectors = getattr(data, name).numpy()
        found[f"sha256 of the {name}' vectors"] = hashlib.sha256(vectors.tobytes()).hexdigest()
    return found


def describe_data(data: TrainingData) -> Iterator[str]:
    """Lines that say what is trained on and what was left out."""
    counted = data.census
    yield (
        f"training on {counted.queries:,} queries: {counted.groups:,} groups of "
        f"{counted.rows:,} candidates; {data.pools.describe()}"
    )
    left_out = [f"{n:,} {why}" for why, n in counted.dropped.items() if n]
    if left_out:
        yield f"left out: {', '.join(left_out)} candidates; {counted.emptied:,} queries emptied"
    if counted.null_rewards:
        yield f"{counted.null_rewards:,} candidates have no score: it counts as 0"
    held_out = data.validation_census
    if data.validation is None and held_out is not None:
        yield "the filters leave nothing of the validation queries: there is no validation"
    elif held_out is not None:
        yield f"validating on {held_out.queries:,} queries: {held_out.rows:,} candidates"
