"""The legacy pipeline's arguments, names and paths.

In go the words of ``lever run vqa okvqa_local 0 query_img_text_icd_img_text rand_sampler
qwen2.5_vl_3B`` (a seventh, ``v3`` or ``v2``, asks for inference); out come how each name was read,
and the place of everything the legacy code expects under ``results/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_data.errors import LeverError, UsageError

MODELS = {
    "qwen2.5_vl_3B": "Qwen2_5-VL-3B-Instruct",
    "qwen2_5_vl_3B": "Qwen2_5-VL-3B-Instruct",
    "flamingo_3B": "flamingo_3B",
}
SAMPLERS = {
    "rand_sampler": "RandSampler",
    "text_sim_sampler": "TextSimSampler",
    "img_sim_sampler": "ImgSimSampler",
    "mix_sampler": "MixSampler",
}
SAMPLES = {"okvqa": 800, "vqav2": 5000}  # queries with InfoScore data, by dataset
ARGUMENTS = ("task", "dataset", "gpu", "lever_lm", "sampler", "model")
VERSIONS = ("v3", "v2")  # of the checkpoint that the seventh word asks to evaluate


@dataclass(frozen=True)
class LegacyRun:
    """The words, as they stand on the command line.

    ``version``: the seventh, which asks for the inference of that checkpoint.
    """

    task: str
    dataset: str
    gpu: str
    lever_lm: str
    sampler: str
    model: str
    version: str | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> LegacyRun:
        """Read the words.

        Raises:
            UsageError: neither six nor seven of them, another task than vqa, or no version.
        """
        if len(words) not in (len(ARGUMENTS), len(ARGUMENTS) + 1):
            raise UsageError(
                f"the legacy form takes {len(ARGUMENTS)} words: {' '.join(ARGUMENTS)}; and "
                f"{' or '.join(VERSIONS)} to evaluate what was trained",
                value=" ".join(words),
                hint="lever run vqa okvqa_local 0 query_img_text_icd_img_text rand_sampler "
                "qwen2.5_vl_3B",
            )
        run = cls(*words)
        if run.task != "vqa":
            raise UsageError(
                "only the task vqa is supported: caption has no VQA accuracy to learn from"
                if run.task == "caption"
                else "unknown task",
                value=run.task,
                hint="lever run vqa …",
            )
        if run.version not in (None, *VERSIONS):
            raise UsageError(
                "unknown version of the selector", value=run.version, hint=", ".join(VERSIONS)
            )
        return run

    def names(self) -> list[tuple[str, str]]:
        """Every word beside what it is read as."""
        return [
            (self.dataset, dataset_name(self.dataset)),
            (self.sampler, sampler_name(self.sampler)),
            (self.model, model_name(self.model)),
        ]


@dataclass(frozen=True)
class LegacyPaths:
    """Where the legacy code keeps things, below the folder it runs in."""

    root: Path
    dataset: str
    sampler: str
    model: str

    @classmethod
    def of(cls, run: LegacyRun, root: Path) -> LegacyPaths:
        """The paths of a run."""
        return cls(
            root, dataset_name(run.dataset), sampler_name(run.sampler), model_name(run.model)
        )

    @property
    def results(self) -> Path:
        """``results/<dataset>``."""
        return self.root / "results" / self.dataset

    def embeddings(self, role: str) -> Path:
        """Embeddings of ``query`` or ``candidate``."""
        return self.results / "cache" / f"{role}_embeddings.pt"

    @property
    def rl_data(self) -> Path:
        """The RL data of this sampler and model."""
        return self.results / "generated_data" / f"rl_data_{self.sampler}_{self.model}.json"

    @property
    def v2_folder(self) -> Path:
        """The folder of the SFT checkpoints."""
        return self.results / "model_cpk" / "v2"

    @property
    def v2_checkpoint(self) -> Path:
        """The SFT checkpoint of this sampler and model."""
        model = self.model.replace("-", "_").replace(".", "_")
        name = (
            f"{model}_{self.sampler}_infoscore_left_beam5_shot2_cand64_"
            f"sample{SAMPLES.get(self.dataset, SAMPLES['okvqa'])}_best.ckpt"
        )
        return self.v2_folder / name

    def v3_folder(self, suffix: str) -> Path:
        """The folder of the RL checkpoints for a reward's suffix."""
        return self.results / "model_cpk" / f"v3_{self.sampler}_{self.model}{suffix}"

    def predictions(self, name: str) -> Path:
        """The folder of an inference; the legacy code's place for its answers is not known."""
        return self.results / "predictions" / name

    def find_v2(self) -> Path | None:
        """The SFT checkpoint: by its name, else the first of this sampler, if any."""
        if self.v2_checkpoint.exists():
            return self.v2_checkpoint
        return next(iter(sorted(self.v2_folder.glob(f"*{self.sampler}*.ckpt"))), None)


def model_name(word: str) -> str:
    """``qwen2.5_vl_3B`` → ``Qwen2_5-VL-3B-Instruct``; unknown names lose dots, slashes, spaces."""
    if word in MODELS:
        return MODELS[word]
    return word.translate(str.maketrans("./ ", "___"))


def dataset_name(word: str) -> str:
    """``okvqa_local``, ``OKVQA`` → ``okvqa``, ``vqav2…`` → ``vqav2``, else the word."""
    return next((name for name in SAMPLES if word.lower().startswith(name)), word)


def sampler_name(word: str) -> str:
    """``rand_sampler`` → ``RandSampler``.

    Raises:
        UsageError: no sampler of the legacy code.
    """
    if word in SAMPLERS.values():
        return word
    if word not in SAMPLERS:
        raise UsageError("unknown sampler", value=word, hint=", ".join(SAMPLERS))
    return SAMPLERS[word]


def choose_checkpoint(folder: Path, grpo_epochs: int) -> Path:
    """The result: the last GRPO epoch, or with GRPO off the last RCE epoch, else the newest file.

    Raises:
        LeverError: there is no checkpoint.
    """
    order = ["grpo", "rce", "dense"] if grpo_epochs else ["rce", "dense"]
    for phase in order:
        found = sorted(folder.glob(f"{phase}_epoch*.pt"), key=_epoch)
        if found:
            return found[-1]
    for pattern in ("*.pt", "*.ckpt"):  # of a folder that was moved over only v2format may be there
        if newest := sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns):
            return newest[-1]
    raise LeverError("there is no checkpoint", where=str(folder))


def _epoch(path: Path) -> int:
    digits = path.stem.rsplit("epoch", 1)[-1]
    return int(digits) if digits.isdigit() else -1
