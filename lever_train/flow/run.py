"""``lever run`` as a library: which config is meant, what is said before and after.

In go a config file or the legacy words; out come the config, the opening lines, and after the run
the closing summary.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lever_data.errors import UsageError
from lever_data.paths import store_name
from lever_train.flow.foresight import require_sense
from lever_train.flow.legacy import legacy_config, sources
from lever_train.flow.legacy_environment import not_understood
from lever_train.flow.legacy_names import ARGUMENTS, VERSIONS, LegacyRun
from lever_train.flow.pipeline import Outputs, Pipeline, PlanLine, Say
from lever_train.flow.steps import build_steps
from lever_train.flow.work import Work
from lever_train.inputs.devices import open_device
from lever_train.learn.train import Advance
from lever_train.options.evaluate import EvalRequest, Figures
from lever_train.options.pipeline import PipelineConfig, load_pipeline

DEFAULT_CONFIG = Path("lever.toml")
_BESIDE_WORDS = ("contest", "answerer")  # parts of an EvalRequest that legacy words leave open


@dataclass(frozen=True)
class RunRequest:
    """A run of the pipeline: a config file, or the legacy words.

    ``answerer``, ``encoder``, ``device``, ``rounds`` and ``budget`` beat the config.
    ``environment`` is read in the legacy form alone. ``asked``: what `lever eval` was given beside
    the words.
    """

    words: tuple[str, ...] = ()
    config: Path | None = None
    answerer: str | None = None
    encoder: str | None = None
    device: str | None = None
    folder: Path = Path()
    environment: Mapping[str, str] = field(default_factory=dict)
    asked: EvalRequest | None = None
    rounds: int | None = None
    budget: int | None = None

    @classmethod
    def of_eval(
        cls,
        words: Sequence[str],
        asked: EvalRequest,
        environment: Mapping[str, str],
        encoder: str | None = None,
    ) -> RunRequest:
        """The inference that `lever eval` is asked for by legacy words; of v3 without a version.

        Raises:
            UsageError: an option that the words answer themselves.
        """
        given = asked.model_dump(exclude_unset=True)
        own = [name for name, value in given.items() if value and name not in _BESIDE_WORDS]
        if own:
            raise UsageError(
                "the legacy words say that themselves",
                value=", ".join(own),
                hint="give the options, or the words; figures and answerer go with both",
            )
        if len(words) == len(ARGUMENTS):
            words = (*words, VERSIONS[0])
        device, answerer = given["contest"].get("device"), given["answerer"].get("spec")
        return cls(
            tuple(words),
            answerer=answerer,
            encoder=encoder,
            device=device,
            environment=environment,
            asked=asked,
        )

    def opening(self) -> list[str]:
        """How the legacy words were read; nothing for a config file.

        Raises:
            UsageError: words that mean nothing.
        """
        if not self.words:
            return []
        run = LegacyRun.of(self.words)
        lines = [f"{said} → {meant}" for said, meant in run.names() if said != meant]
        lines += not_understood(self.environment)
        if self.device is None and self._device(run) == "cpu":
            doing = "training" if run.version is None else "evaluating"
            lines.append(f"GPU {run.gpu} is not there: {doing} on the CPU, as the script does")
        return [f"task {run.task}, encoder setting {run.lever_lm}", *lines]

    def _device(self, run: LegacyRun) -> str:
        """Where the legacy form trains: the GPU it names where there is one, else the CPU."""
        from torch import cuda

        if self.device is not None:
            return self.device
        return f"cuda:{run.gpu}" if cuda.is_available() else "cpu"

    def resolve(self) -> PipelineConfig:
        """The config that is meant.

        Raises:
            UsageError: no config, or one that is not allowed.
            LeverError: the legacy form lacks a file.
        """
        if self.words and self.config is not None:
            raise UsageError("a config file and the legacy words exclude each other")
        if self.words:
            run = LegacyRun.of(self.words)
            root = self.folder.absolute()
            config = legacy_config(
                run,
                root,
                self.environment,
                self._device(run),
                answerer=self.answerer,
                encoder=self.encoder,
            )
        else:
            path = self.config or self.folder / DEFAULT_CONFIG
            if self.config is None and not path.exists():
                raise UsageError(
                    "there is no lever.toml here",
                    hint="--config FILE, or the legacy words: lever run vqa okvqa_local 0 "
                    "query_img_text_icd_img_text rand_sampler qwen2.5_vl_3B",
                )
            config = load_pipeline(path)
        return self._overridden(config)

    def _overridden(self, config: PipelineConfig) -> PipelineConfig:
        if self.asked is not None:
            given = self.asked.model_dump(exclude_unset=True)
            figures = {k: v for k, v in given["contest"].items() if k in Figures.model_fields}
            config = config.model_copy(
                update={
                    "eval": config.eval.model_copy(update=figures),
                    "answerer": config.answerer.model_copy(update=given["answerer"]),
                }
            )
        if self.answerer is not None:
            answerer = config.answerer.model_copy(update={"spec": self.answerer})
            config = config.model_copy(update={"answerer": answerer})
        given = {"count": self.rounds, "budget": self.budget}
        if told := {name: value for name, value in given.items() if value is not None}:
            config = config.model_copy(update={"rounds": config.rounds.but(**told)})
        if self.encoder is not None:
            embed = config.embed.model_copy(update={"encoder": self.encoder})
            config = config.model_copy(update={"embed": embed})
        if self.device is not None:
            run = config.train.run.model_copy(update={"device": self.device})
            train = config.train.model_copy(update={"run": run})
            config = config.model_copy(update={"train": train})
        return config


def found(request: RunRequest, config: PipelineConfig) -> list[str]:
    """Which files the legacy words led to, and what is made for want of them."""
    return sources(config) if request.words else []


def mode(config: PipelineConfig) -> str:
    """``RCE only`` or ``RCE + GRPO``, with the epochs; or what is evaluated."""
    if config.eval.checkpoint is not None:
        return f"inference with {config.eval.checkpoint}"
    if config.train.run.stage == "dense":
        return f"dense ({config.train.dense.epochs} epochs)"
    rce, grpo = config.train.rce.epochs, config.train.grpo.epochs
    return f"RCE + GRPO ({rce} + {grpo} epochs)" if grpo else f"RCE only ({rce} epochs)"


def plan(config: PipelineConfig, force: Sequence[str] = ()) -> list[PlanLine]:
    """What a run would do; nothing is changed."""
    return _pipeline(config, lambda line: None, lambda done, total, note="": None).plan(force)


def run(
    config: PipelineConfig, say: Say, advance: Advance, force: Sequence[str] = ()
) -> dict[str, Outputs]:
    """Run what is needed; the outputs of every step.

    Raises:
        LeverError: a step failed; what was done before it stays done.
    """
    return _pipeline(config, say, advance).run(say, force)


def summary(config: PipelineConfig, outputs: Mapping[str, Outputs]) -> list[tuple[str, str]]:
    """What was made, as (name, value)."""
    found = [
        ("mode", mode(config)),
        ("store", store_name(config.data.store)),
        ("selector", str(_selector(config, outputs))),
    ]
    for name, step, key in (
        ("older format", "convert", "checkpoint"),
        ("audit", "audit", "html"),
        ("curves", "train", "curves"),
        ("scoreboard", "evaluate", "html"),
    ):
        if key in outputs.get(step, {}):
            found.append((name, outputs[step][key]))
    if config.eval.predictions is not None:
        found.append(("answers", str(config.eval.predictions / "*_shot*.json")))
    return found


def use_it(config: PipelineConfig, outputs: Mapping[str, Outputs]) -> str:
    """The command that picks demonstrations with the selector, to be pasted into a shell.

    Its questions are those of the eval split, or of the train split where no others have
    embeddings.
    """
    work = Work(config, print, lambda done, total, note="": None)
    data = config.data
    query, candidate, held_out = work.embeddings(outputs)
    of_train, of_eval = work.pools(outputs)
    split, pool, questions = data.eval_split, of_eval, (data.eval_questions, data.eval_annotations)
    if held_out is None:
        split, pool, questions = data.train_split, of_train, (data.questions, data.annotations)
    options = {
        "store": store_name(data.store),
        "checkpoint": _selector(config, outputs),
        "dataset": data.dataset,
        "split": split,
        "candidate-split": data.train_split,
        "query-embeddings": held_out or query,
        "candidate-embeddings": candidate,
        "pool": pool,
        "questions": questions[0],
        "annotations": questions[1],
        "image-root": data.image_root,
        "image-name": data.image_name,
        "out": "picks.jsonl",
    }
    words = [w for name, v in options.items() if v is not None for w in (f"--{name}", str(v))]
    return shlex.join(["lever", "predict", *words])


def _selector(config: PipelineConfig, outputs: Mapping[str, Outputs]) -> Path:
    return config.eval.checkpoint or Path(outputs["train"]["checkpoint"])


def _pipeline(config: PipelineConfig, say: Say, advance: Advance) -> Pipeline:
    """The steps, once everything that a plan can know is known to be there.

    Raises:
        UsageError: this machine lacks the device, or a name in the config means nothing.
    """
    open_device(config.train.run.device)
    require_sense(config)
    return Pipeline(config.data.out, build_steps(config, say, advance))
