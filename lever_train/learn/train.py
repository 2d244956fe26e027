"""The training: one loop for every stage, resumable at any step.

In go a store, a config and an output folder; out come checkpoints the legacy code can load,
metrics, the resolved config and the provenance. One step, forward to optimizer, is
:meth:`lever_train.learn.step.Learner.step`; this file walks over phases, epochs and batches, and
keeps the state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from lever_data.errors import LeverError
from lever_train.learn import distributed
from lever_train.learn.batch import Loader
from lever_train.learn.data import describe_data, open_data
from lever_train.learn.folder import TrainingFolder
from lever_train.learn.log import Track, require_extras
from lever_train.learn.losses import group_weights, tied_groups
from lever_train.learn.setup import frozen_copy, new_selector, phases_of, set_trained, title_of
from lever_train.learn.state import State, fingerprint, load_state, save_state
from lever_train.learn.step import Figures, Learner, Phase, adapt_beta
from lever_train.learn.validate import figure_names, is_better, judged, require_finite, validate
from lever_train.options.resolve import changes_toml
from lever_train.options.train import Source, TrainConfig
from lever_train.selector.checkpoint import Progress
from lever_train.selector.model import Selector

_SHOWN = {  # of an epoch's figures, and how the row of the epoch calls them
    "train_loss": "loss",
    "train_kl": "kl",
    "train_beta": "beta",
    "val_loss": "val_loss",
    "val_pick_accuracy": "val_pick_accuracy",
    "val_expected_reward": "val_expected_reward",
    "val_ess": "ess",
}


class Advance(Protocol):
    """Where progress is reported: work done and in all, and a note."""

    def __call__(self, done: float, total: float | None, note: str = "") -> None:
        """Report ``done`` of ``total`` groups."""


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


def train(
    source: Source,
    out: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda line: None,
    advance: Advance = lambda done, total, note="": None,
) -> TrainResult:
    """Run a training, or the rest of one, to its end.

    Args:
        resume: go on with the training in ``out``.
        overwrite: replace it.
        notify: gets one line for people.
        advance: gets the groups done.

    Raises:
        LeverError: the data, the checkpoint or the state does not fit, a loss is not finite, or
            another training writes the folder at this moment.
        KeyboardInterrupt: it was asked to stop; the state is saved.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    world = distributed.join(config.run.device)
    folder = TrainingFolder(out)
    try:
        with distributed.Interrupt() as interrupt:
            training = _Training(folder, config, world, interrupt, notify, advance)
            training.open(source, resume=resume, overwrite=overwrite)
            return training.run()
    finally:
        folder.release()
        distributed.leave(world)


class _Training:
    def __init__(
        self,
        folder: TrainingFolder,
        config: TrainConfig,
        world: distributed.World,
        interrupt: distributed.Interrupt,
        notify: Callable[[str], None],
        advance: Advance,
    ) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.interrupt, self.notify, self.advance = interrupt, notify, advance
        self.groups, self.seconds = 0, 0.0

    def open(self, source: Source, *, resume: bool, overwrite: bool) -> None:
        """Read everything, and refuse what does not fit before anything is written."""
        self.source, config = source, self.config
        self.phases = phases_of(config)
        require_extras(config.run)
        if self.world.is_main:
            start = config.model.sft_checkpoint
            self.folder.check(resume=resume, overwrite=overwrite, start=start)
        self.replaces = self.folder.earlier() if overwrite else []
        self.world.wait()  # every process has looked before one writes
        self.data = open_data(source, config)
        for line in describe_data(self.data):
            self._say(line)
        self.selector, self.config = new_selector(
            config, self.data.queries.shape[1], self._say, self.data.features
        )
        device = torch.device(config.run.device)
        self.selector.to(device)
        self.loader = Loader(
            self.data,
            device,
            batch_size=config.run.batch_size,
            shot_num=config.data.shot_num,
            can_stop=self.config.model.ends_pointers,
            rank=self.world.rank,
            world=self.world.size,
        )
        for phase in self.phases:
            set_trained(self.selector, phase, self.config)
        if self.data.validation is not None:  # that there is a figure to judge by
            judged(dict.fromkeys(figure_names(self.config, self.data.validation), 0.0), self.config)
        self.state = self._first_state(resume)
        self.resumes = resume

    def run(self) -> TrainResult:
        config = self.config
        if self.replaces:
            self._say(f"reading all data once before the training in {self.folder.out} goes")
            self._rehearse()
            if self.interrupt.agreed(self.world):
                self._say("stopped: it stays")
                raise KeyboardInterrupt
        self._settle()
        self._say(changes_toml(config).rstrip())  # config.toml has all of it
        self.track: Track | None = None
        if config.run.trackio and self.world.is_main:
            name, options = self.folder.out.resolve().name, config.model_dump(mode="json")
            self.track = Track(name, options, resume=self.resumes)
        try:
            self._run_phases()
        except LeverError as error:
            # a full disk is not the training's fault: what it saved can be resumed
            if self.world.is_main and not isinstance(error.__cause__, OSError):
                self.folder.clear()
            raise
        finally:
            if self.track is not None:
                self.track.end()
        if config.run.stage == "rl" and config.grpo.epochs == 0:
            self._say(f"{title_of(Phase('grpo', 1, 0), config)}: the RCE model is the result")
        if self.world.is_main:
            self._say(self.folder.commit(self.source, config, self.data, self.state.log))
        return self._result()

    def _rehearse(self) -> None:
        """Read every batch of the first epoch and of validation, in their order, so that what
        would stop the training stops it before an earlier one goes: a reward that is not finite, a
        pointer outside its pool, nothing but ties. Of several processes each reads its share."""
        config, stage = self.config, self.phases[0].name
        counts = torch.zeros(3, dtype=torch.float64)  # weight, tied groups, groups
        order, seed = config.data.order, config.run.seed
        for batch in self.loader.batches(self.data.train, order=order, seed=seed):
            weight = group_weights(batch, stage, config).sum()
            tied = tied_groups(batch.reward, batch.mask).sum()
            counts += torch.stack([weight, tied, torch.tensor(len(batch))])
        total, all_tied, groups = self.world.sum(counts).tolist()
        if not total:
            raise nothing_to_learn(config, all_tied, groups)
        if self.data.validation is not None:
            for _ in self.loader.batches(self.data.validation, order="file"):
                pass

    def _settle(self) -> None:
        """Make the folder this training's own.

        The state comes first: killed before, an earlier training is whole; killed after, this one
        is there to resume, whatever happens, and deletes what is left of the earlier one.
        """
        if self.world.is_main:
            self.folder.prepare()
        if not self.state.selector:
            self.state.replaces = self.replaces
            self._save({})
        if self.world.is_main:
            self.folder.delete(self.state.replaces)
            self.folder.describe(self.config, self.data.provenance)
        self.state.replaces = []

    def _run_phases(self) -> None:
        state, optimizer = self.state, self.state.optimizer
        for phase in self.phases[state.phase :]:
            self._say(title_of(phase, self.config))
            for line in set_trained(self.selector, phase, self.config):
                self._say(line)
            learner = Learner(
                phase,
                self.selector,
                self.loader,
                self.config,
                steps=phase.epochs * math.ceil(self.data.census.groups / self.loader.batch_size),
                reference=self._reference() if phase.name == "grpo" else None,
                world=self.world,
            )
            if optimizer:
                learner.optimizer.load_state_dict(optimizer)
            while state.epoch < phase.epochs:
                self._run_epoch(learner)
                self._end_epoch(learner)
            state.phase, state.epoch, state.step = phase.number + 1, 0, 0
            self._save({})
            optimizer = {}

    def _run_epoch(self, learner: Learner) -> None:
        state, config, phase = self.state, self.config, learner.phase
        batches = self.loader.batches(
            self.data.train,
            order=config.data.order,
            seed=config.run.seed,
            epoch=phase.first_epoch + state.epoch,
            skip_groups=state.groups,
            weigh=partial(group_weights, stage=phase.name, config=config),
        )
        started, begun, before = time.perf_counter(), self.groups, self.seconds
        for batch in batches:
            figures = learner.step(batch, state.step, epoch=state.epoch, beta=state.beta)
            state.log.step(phase.name, state.epoch + 1, state.step, figures)
            state.step += 1
            state.groups += int(figures["groups"])
            self.groups += int(figures["groups"])
            state.beta = self._next_beta(figures)
            self.seconds = before + time.perf_counter() - started
            rate = (self.groups - begun) / (self.seconds - before)
            self.advance(
                state.groups,
                self.data.census.groups,
                f"{phase.name} {state.epoch + 1}/{phase.epochs}  {rate:,.0f} queries/s  "
                f"loss {figures['loss']:.4f}",
            )
            stop = self.interrupt.agreed(self.world)
            if stop or state.step % config.run.save_every == 0:
                self._save(learner.optimizer.state_dict())
            if stop:
                self._say(f"stopped after step {state.step}; --resume goes on from there")
                raise KeyboardInterrupt

    def _next_beta(self, figures: Figures) -> float:
        """β after a step; it stays where nothing adapts it."""
        grpo, kl = self.config.grpo, figures.get("kl", math.nan)
        if not grpo.kl_adaptive or math.isnan(kl):
            return self.state.beta
        return adapt_beta(kl, self.state.beta, grpo.kl_target_min, grpo.kl_target_max)

    def _end_epoch(self, learner: Learner) -> None:
        state, config, phase = self.state, self.config, learner.phase
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
        self._say(_row(phase, epoch, figures))
        value = judged(figures, config)
        best = state.best is None or is_better(value, state.best[1], config)
        if best:
            state.best = (f"{phase.name}_epoch{epoch}.pt", value)
        if self.world.is_main:
            progress = Progress(epoch, phase.name, state.beta, figures)
            self.folder.checkpoint(self.selector, progress, best)
            self.folder.metrics(state.log, tensorboard=config.run.tensorboard)
        if self.track is not None:
            self.track.epoch(state.log, phase.name, epoch)
        state.epoch, state.groups = epoch, 0
        self._save(learner.optimizer.state_dict())

    def _reference(self) -> Selector:
        """The policy GRPO is measured against; what RCE ended with is noted when GRPO begins."""
        known = self.state.references
        if "rce" not in known:
            known["rce"] = dict(frozen_copy(self.selector).state_dict())
        reference = frozen_copy(self.selector)
        reference.load_state_dict(known[self.config.grpo.reference])
        return reference

    def _first_state(self, resume: bool) -> State:
        threads = self.world.each(torch.get_num_threads())
        identity = fingerprint(self.config, self.data, threads)
        if resume:
            state = load_state(self.folder.out, identity, len(self.phases))
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
            save_state(self.folder.out, self.state)

    def _result(self) -> TrainResult:
        out, best = self.folder.out, self.state.best
        if best is None:
            raise AssertionError("a training ended without an epoch")
        epochs = self.state.log.epochs()
        last = f"{epochs[-1]['phase']}_epoch{epochs[-1]['epoch']}.pt"
        files = out / last, out / best[0]
        spent = self.groups, self.seconds
        return TrainResult(out, *files, epochs, *spent, is_main=self.world.is_main)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            self.notify(line)


def nothing_to_learn(config: TrainConfig, tied: float, groups: float) -> LeverError:
    """The error of a training whose groups are all tied."""
    return LeverError(
        "every group is tied: there is nothing to learn from",
        where=", ".join(config.data.view),
        value=f"{tied:,.0f} of {groups:,.0f} groups",
        hint="--tied-groups keep trains on them all the same; another reward may tell "
        "the candidates apart",
    )


def _row(phase: Phase, epoch: int, figures: Figures) -> str:
    """The row of a finished epoch: what there is of the figures people watch."""
    shown = [f"{t} {figures[name]:.4f}" for name, t in _SHOWN.items() if name in figures]
    tied = f"{figures['tied']:,.0f} of {figures['groups']:,.0f} groups tied"
    return f"[{phase.name.upper()}] epoch {epoch}/{phase.epochs}: {'  '.join(shown)}  {tied}"
