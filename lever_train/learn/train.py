"""The training: one loop for every stage, resumable at any step.

In go a store, a config and an output folder; out come checkpoints the legacy code can load,
metrics, the resolved config and the provenance. A stage is a function in ``objectives.py``; this
file only walks over phases, epochs and batches, and keeps the state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lever_train.learn import distributed
from lever_train.learn.batch import Share
from lever_train.learn.data import Source, describe_data, open_data
from lever_train.learn.finite import require_finite
from lever_train.learn.interrupt import Interrupt
from lever_train.learn.loader import Loader, Position
from lever_train.learn.objectives import Settings
from lever_train.learn.outputs import Outputs
from lever_train.learn.rehearse import nothing_to_learn, rehearse
from lever_train.learn.schedule import adapt_beta, rce_temperature, warm_up
from lever_train.learn.setup import Phase, frozen_copy, new_selector, phases_of, set_trained
from lever_train.learn.state import State, fingerprint, load_state, save_state
from lever_train.learn.step import Figures, Stepper
from lever_train.learn.tensorboard import require_tensorboard
from lever_train.learn.validate import figure_names, is_better, judged, validate
from lever_train.options.resolve import to_toml
from lever_train.options.train import TrainConfig
from lever_train.selector.checkpoint import Progress
from lever_train.selector.model import Selector


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
    epoch, and the groups and seconds spent in training epochs. Of several processes only one
    ``is_main`` and should speak."""

    out: Path
    last: Path
    best: Path
    epochs: list[dict[str, Any]]
    groups: int
    seconds: float
    is_main: bool


def train(request: TrainRequest) -> TrainResult:
    """Run a training, or the rest of one, to its end.

    Raises:
        LeverError: the data, the checkpoint or the state does not fit, a loss is not finite, or
            another training writes the folder at this moment.
        KeyboardInterrupt: it was asked to stop; the state is saved.
    """
    if request.config.run.threads is not None:
        torch.set_num_threads(request.config.run.threads)
    world = distributed.join(request.config.run.device)
    outputs = Outputs(request.out)
    try:
        with Interrupt() as interrupt:
            return _Training(request, outputs, world, interrupt).run()
    finally:
        outputs.lock.release()
        distributed.leave(world)


class _Training:
    def __init__(
        self,
        request: TrainRequest,
        outputs: Outputs,
        world: distributed.World,
        interrupt: Interrupt,
    ) -> None:
        self.request, self.outputs = request, outputs
        self.world, self.interrupt = world, interrupt
        self.phases = phases_of(request.config)
        if request.config.run.tensorboard:
            require_tensorboard()
        if world.is_main:
            start = request.config.model.sft_checkpoint
            self.outputs.check(resume=request.resume, overwrite=request.overwrite, start=start)
        self.replaces = self.outputs.earlier() if request.overwrite else []
        world.wait()  # every process has looked before one writes
        self.data = open_data(request.source, request.config)
        for line in describe_data(self.data):
            self._say(line)
        width = self.data.queries.shape[1]
        self.selector, self.config = new_selector(request.config, width, self._say)
        device = torch.device(self.config.run.device)
        self.selector.to(device)
        self.loader = Loader(
            self.data,
            device,
            batch_size=self.config.run.batch_size,
            shot_num=self.config.data.shot_num,
            share=Share(world.rank, world.size),
        )
        self._require_valid()
        self.state = self._first_state()
        self.groups, self.seconds = 0, 0.0

    def run(self) -> TrainResult:
        config = self.config
        if self.replaces:
            self._say(f"reading all data once before the training in {self.outputs.out} goes")
            rehearse(self.loader, self.data, self.phases[0].name, config, self.world)
            if self.interrupt.agreed(self.world):
                self._say("stopped: it stays")
                raise KeyboardInterrupt
        self._settle()
        self._say(to_toml(config).rstrip())
        optimizer = self.state.optimizer
        for number in range(self.state.phase, len(self.phases)):
            self._run_phase(number, optimizer)
            optimizer = {}
        if config.run.stage == "rl" and config.grpo.epochs == 0:
            self._say(f"{Phase('grpo', 0, 0).describe(config)}: the RCE model is the result")
        if self.world.is_main:
            self._say(self.outputs.commit(self.request.source, config, self.data, self.state.log))
        return self._result()

    def _settle(self) -> None:
        """Make the folder this training's own.

        The state comes first: killed before, an earlier training is whole; killed after, this one
        is there to resume, whatever happens, and deletes what is left of the earlier one.
        """
        if self.world.is_main:
            self.outputs.prepare()
        if not self.state.selector:
            self.state.replaces = self.replaces
            self._save({})
        if self.world.is_main:
            self.outputs.delete(self.state.replaces)
            self.outputs.describe(self.config, self.data.provenance)
        self.state.replaces = []

    def _run_phase(self, number: int, optimizer: dict[str, Any]) -> None:
        phase, state = self.phases[number], self.state
        self._say(phase.describe(self.config))
        for line in set_trained(self.selector, phase, self.config):
            self._say(line)
        stepper = Stepper(phase.name, number, self.selector, self.loader, self.config, self.world)
        if optimizer:
            stepper.optimizer.load_state_dict(optimizer)
        reference = self._reference() if phase.name == "grpo" else None
        while state.epoch < phase.epochs:
            self._run_epoch(phase, stepper, reference)
            self._end_epoch(phase, stepper)
        state.phase, state.epoch, state.step = number + 1, 0, 0
        self._save({})

    def _run_epoch(self, phase: Phase, stepper: Stepper, reference: Selector | None) -> None:
        state, run = self.state, self.config.run
        per_epoch = math.ceil(self.data.census.groups / run.batch_size)
        place = phase.first_epoch + state.epoch
        position = Position(self.config.data.order, run.seed, place, state.groups)
        started, begun = time.perf_counter(), self.groups
        before = self.seconds
        for batch in self.loader.batches(self.data.train, position):
            settings = self._settings(phase, per_epoch * phase.epochs, reference)
            figures = stepper.step(batch, settings, state.step)
            logged = figures | phase.settings(settings)
            state.log.step(phase.name, state.epoch + 1, state.step, logged)
            self._after_step(phase, figures)
            self.seconds = before + time.perf_counter() - started
            self._report(phase, figures, self.groups - begun, time.perf_counter() - started)
            self._save_now_and_then(stepper)

    def _after_step(self, phase: Phase, figures: Figures) -> None:
        state, grpo = self.state, self.config.grpo
        state.step += 1
        state.groups += int(figures["groups"])
        self.groups += int(figures["groups"])
        if phase.name == "grpo" and grpo.kl_adaptive and not math.isnan(figures["kl"]):
            low, high = grpo.kl_target_min, grpo.kl_target_max
            state.beta = adapt_beta(figures["kl"], state.beta, low, high)

    def _report(self, phase: Phase, figures: Figures, groups: int, seconds: float) -> None:
        self.request.advance(
            self.state.groups,
            self.data.census.groups,
            f"{phase.name} {self.state.epoch + 1}/{phase.epochs}  "
            f"{groups / seconds:,.0f} queries/s  loss {figures['loss']:.4f}",
        )

    def _save_now_and_then(self, stepper: Stepper) -> None:
        stop = self.interrupt.agreed(self.world)
        if stop or self.state.step % self.config.run.save_every == 0:
            self._save(stepper.optimizer.state_dict())
        if stop:
            self._say(f"stopped after step {self.state.step}; --resume goes on from there")
            raise KeyboardInterrupt

    def _end_epoch(self, phase: Phase, stepper: Stepper) -> None:
        state, config = self.state, self.config
        epoch = state.epoch + 1
        figures = state.log.epoch_figures(phase.name, epoch)
        if "train_loss" not in figures:
            raise nothing_to_learn(config, figures["tied"], figures["groups"])
        if self.data.validation is not None:
            figures |= validate(
                self.selector, self.loader, self.data.validation, config, self.world
            )
        require_finite(self.selector, figures, f"epoch {epoch} of {phase.name}, step {state.step}")
        state.log.epoch(phase.name, epoch, figures)
        self._say(phase.row(epoch, figures))
        value = judged(figures, config)
        best = state.best is None or is_better(value, state.best[1], config)
        if best:
            state.best = (f"{phase.name}_epoch{epoch}.pt", value)
        if self.world.is_main:
            progress = Progress(epoch, phase.name, state.beta, figures)
            self._say(f"wrote {self.outputs.checkpoint(self.selector, progress, best)}")
            self.outputs.metrics(state.log, tensorboard=config.run.tensorboard)
        state.epoch, state.groups = epoch, 0
        self._save(stepper.optimizer.state_dict())

    def _settings(self, phase: Phase, total: int, reference: Selector | None) -> Settings:
        grpo, rce, step = self.config.grpo, self.config.rce, self.state.step
        if phase.name == "sft":
            return Settings(lr_factor=warm_up(step, total, self.config.sft.warm_up))
        if phase.name == "rce":
            start, end = rce.temperature_start, rce.temperature_end
            return Settings(temperature=rce_temperature(step, total, start, end))
        top_k = grpo.early_top_k if self.state.epoch < grpo.early_epochs else grpo.late_top_k
        return Settings(beta=self.state.beta, top_k=top_k or None, reference=reference)

    def _reference(self) -> Selector:
        """The policy GRPO is measured against; what RCE ended with is noted when GRPO begins."""
        known = self.state.references
        if "rce" not in known:
            known["rce"] = dict(frozen_copy(self.selector).state_dict())
        reference = frozen_copy(self.selector)
        reference.load_state_dict(known[self.config.grpo.reference])
        return reference

    def _require_valid(self) -> None:
        """Find what a phase or an epoch's end would refuse, before an earlier training goes."""
        for phase in self.phases:
            set_trained(self.selector, phase, self.config)
        if self.data.validation is not None:
            names = figure_names(self.config, self.data.validation)
            judged(dict.fromkeys(names, 0.0), self.config)

    def _first_state(self) -> State:
        threads = self.world.each(torch.get_num_threads())
        identity = fingerprint(self.config, self.data, threads)
        if self.request.resume:
            state = load_state(self.request.out, identity)
            self.selector.load_state_dict(state.selector)
            place = f"phase {state.phase + 1}, epoch {state.epoch + 1}, step {state.step}"
            self._say(f"resuming at {place}")
            return state
        state = State(identity, beta=self.config.grpo.kl_beta_init)
        if any(phase.name == "grpo" for phase in self.phases):
            state.references["sft"] = dict(frozen_copy(self.selector).state_dict())
        return state

    def _save(self, optimizer: dict[str, Any]) -> None:
        self.state.selector = dict(self.selector.state_dict())
        self.state.optimizer = optimizer
        if self.world.is_main:
            save_state(self.request.out, self.state)

    def _result(self) -> TrainResult:
        out, best = self.request.out, self.state.best
        if best is None:
            raise AssertionError("a training ended without an epoch")
        epochs = self.state.log.epochs()
        last = f"{epochs[-1]['phase']}_epoch{epochs[-1]['epoch']}.pt"
        files = out / last, out / best[0]
        spent = self.groups, self.seconds
        return TrainResult(out, *files, epochs, *spent, is_main=self.world.is_main)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            self.request.notify(line)
