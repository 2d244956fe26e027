"""The legacy form of ``lever run`` as a :class:`PipelineConfig`.

In go the words, the script's environment variables and the folder the call is made in. What lies
where the legacy code keeps it is given to the pipeline; the rest it makes, and puts there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lever_data.errors import LeverError
from lever_train.flow.legacy_environment import reward_suffix, rl_reader, train_config
from lever_train.flow.legacy_files import LegacyFiles, has_examples, sees_images
from lever_train.flow.legacy_names import SAMPLES, LegacyPaths, LegacyRun, choose_checkpoint
from lever_train.flow.pipeline import Pipeline, is_made
from lever_train.options.pipeline import (
    AnswererTable,
    BeamTable,
    DataTable,
    EmbedTable,
    EvalTable,
    PipelineConfig,
    PoolTable,
    SftTable,
)
from lever_train.options.train import TrainConfig

CLIP = "openai/clip-vit-base-patch32"
POOL = 64  # demonstrations that the legacy samplers by similarity give a query
# what transformers calls the models of the legacy words
_WEIGHTS = {"Qwen2_5-VL-3B-Instruct": "Qwen/Qwen2.5-VL-3B-Instruct"}


class LegacyCall:
    """What a legacy call finds, and the pipeline of it.

    Args:
        run: the words.
        root: the folder the call is made in.
        environment: the script's variables.
        answerer: who answers; ``None``: the model of the words, where it is on this machine.
        encoder: who embeds; ``None``: CLIP, likewise.
    """

    def __init__(
        self,
        run: LegacyRun,
        root: Path,
        environment: Mapping[str, str],
        *,
        answerer: str | None = None,
        encoder: str | None = None,
    ) -> None:
        self.paths = LegacyPaths.of(run, root)
        self.out = self.paths.v3_folder(reward_suffix(environment))
        self.reader = rl_reader(environment)
        self.store = self.paths.results / "lever-store"
        self.rl_data = self.paths.rl_data
        if named := environment.get("RL_DATA_PATH"):
            self.rl_data = root / Path(named).expanduser()
        self.vectors = [self.paths.embeddings(role) for role in ("query", "candidate")]
        self.has_rl = self._is_given(self.rl_data)
        self.has_vectors = any(self._is_given(path) for path in self.vectors)
        self.sft = self.paths.find_v2()
        self.files = LegacyFiles(root, (self.paths.dataset, run.dataset))
        self.questions = self.files.questions("train")
        self.encoder = encoder or CLIP
        self.sees = None if self.has_vectors else sees_images(self.encoder)
        if answerer is None:
            weights = _WEIGHTS.get(self.paths.model, self.paths.model)
            answerer = f"transformers:{weights}" if sees_images(weights) else None
        self.answerer = answerer

    def config(self, training: TrainConfig) -> PipelineConfig:
        """The pipeline of the call.

        Raises:
            LeverError: something is missing that cannot be made; it names everything that is.
        """
        self._require_all()
        images = self.files.image_root()
        # figures of another answerer than the words name would be wrong without a word
        judged = self.files.questions("val") if self.answerer else (None, None)
        similar = self.paths.sampler in ("TextSimSampler", "ImgSimSampler") and not self.has_rl
        return PipelineConfig(
            data=DataTable(
                store=self.store,
                out=self.out,
                checkpoints=self.out,
                dataset=self.paths.dataset,
                order="question_id",
                rl_data=(self.rl_data,) if self.has_rl else (),
                rl_out=None if self.has_rl else self.rl_data,
                rl_reader=self.reader,
                questions=self.questions[0],
                annotations=self.questions[1],
                eval_questions=judged[0],
                eval_annotations=judged[1],
                query_embeddings=self.vectors[0] if self.has_vectors else None,
                candidate_embeddings=self.vectors[1] if self.has_vectors else None,
                cache=None if self.has_vectors else self.vectors[0].parent,
                image_root=images,
            ),
            embed=EmbedTable(
                encoder=self.encoder, features="both" if images and self.sees else "text"
            ),
            pool=PoolTable(size=POOL if similar else None),
            beam=BeamTable(limit=SAMPLES.get(self.paths.dataset, SAMPLES["okvqa"])),
            sft=SftTable(checkpoint=self.sft),
            answerer=AnswererTable(spec=self.answerer or "nearest"),
            train=training,
        )

    def inference(self, version: str, training: TrainConfig) -> PipelineConfig:
        """The evaluation of what was trained by these words: the v3 checkpoint that a training
        with the same variables names as its result, or the v2 one it starts from.

        Raises:
            LeverError: something is missing that cannot be made; it names everything that is.
        """
        checkpoint = self._trained(version, training.grpo.epochs)
        made = [path.is_file() for path in self.vectors]
        held_out = self.out / "cache" / "val" / "query_embeddings.pt"
        has_held_out = is_made(self.out, self.vectors[0]) and is_made(self.out, held_out)
        judged, images = self.files.questions("val"), self.files.image_root()
        self._require_inference(version, checkpoint, judged, has_held_out)
        assert checkpoint is not None
        out = self.paths.predictions(self.out.name if version == "v3" else checkpoint.stem)
        sees = sees_images(self.encoder)
        similar = self.paths.sampler in ("TextSimSampler", "ImgSimSampler")
        return PipelineConfig(
            data=DataTable(
                store=self.store,
                out=out,
                dataset=self.paths.dataset,
                order="question_id",
                questions=self.questions[0],
                annotations=self.questions[1],
                eval_questions=judged[0],
                eval_annotations=judged[1],
                query_embeddings=self.vectors[0] if all(made) else None,
                candidate_embeddings=self.vectors[1] if all(made) else None,
                eval_embeddings=held_out if has_held_out else None,
                image_root=images,
            ),
            embed=EmbedTable(encoder=self.encoder, features="both" if images and sees else "text"),
            pool=PoolTable(size=POOL if similar else None),
            answerer=AnswererTable(spec=self.answerer or "nearest"),
            train=training,
            eval=EvalTable(checkpoint=checkpoint, predictions=out),
        )

    def _trained(self, version: str, grpo_epochs: int) -> Path | None:
        if version == "v2":  # else the one that a training by these words made
            sft = Pipeline(self.out, []).state.get("sft", {}).get("outputs", {})
            return self.sft or (Path(sft["checkpoint"]) if "checkpoint" in sft else None)
        try:
            return choose_checkpoint(self.out, grpo_epochs)
        except LeverError:
            return None  # named below, with all else that is missing

    def _require_inference(
        self,
        version: str,
        checkpoint: Path | None,
        judged: tuple[Path | None, Path | None],
        has_held_out: bool,
    ) -> None:
        missing: dict[str, str] = {}
        if checkpoint is None:
            folder = self.out if version == "v3" else self.paths.v2_folder
            missing[f"a {version} checkpoint in {folder}"] = (
                "the words without the version train one; the variables of the training name its "
                "folder"
            )
        folders = " or ".join(map(str, self.files.folders))
        known = {"train": has_examples(self.store, self.paths.dataset, "train"), "val": False}
        for split, found in (("train", self.questions), ("val", judged)):
            if found[0] is None and not known[split]:
                missing[f"questions and annotations of the split {split} in {folders}"] = (
                    "put the official files there, under their own names"
                )
        if self.answerer is None:
            missing[f"the model {self.paths.model}, which answers"] = (
                "fetch the model's weights, or --answerer says who answers"
            )
        if not has_held_out and sees_images(self.encoder) is None:
            missing[f"the encoder {self.encoder}, which embeds the questions of the split val"] = (
                "fetch it, or --encoder FOLDER names another"
            )
        _refuse(missing)

    def _is_given(self, path: Path) -> bool:
        """Whether a file is there that is not what an earlier run of this very call made."""
        return path.exists() and not is_made(self.out, path)

    def _require_all(self) -> None:
        """Refuse a run that lacks what cannot be made, naming all of it."""
        missing: dict[str, str] = {}
        rolls_out = self.sft is None or not self.has_rl
        stored = self.questions[0] or has_examples(self.store, self.paths.dataset, "train")
        if not stored and (rolls_out or not self.has_vectors):
            folders = " or ".join(map(str, self.files.folders))
            missing[f"questions and annotations of the split train in {folders}"] = (
                "put the official files there, under their own names"
            )
        if rolls_out and self.answerer is None:
            made = self.paths.v2_checkpoint if self.sft is None else self.rl_data
            missing[f"the model {self.paths.model}, which makes {made}"] = (
                "fetch the model's weights, or --answerer says who answers"
            )
        if self.has_vectors:
            for path in self.vectors:
                if not path.exists():
                    missing[str(path)] = "move the other embeddings away to have both made"
        elif self.sees is None:
            missing[f"the encoder {self.encoder}, which makes {self.vectors[0]}"] = (
                "fetch it, or --encoder FOLDER names another"
            )
        _refuse(missing)


def _refuse(missing: Mapping[str, str]) -> None:
    if missing:
        raise LeverError(
            "missing, and cannot be made here: " + "; ".join(missing),
            hint="; ".join(dict.fromkeys(missing.values())),
        )


def sources(config: PipelineConfig) -> list[str]:
    """Where everything of a legacy call comes from: what was found, and what is made instead."""
    data, lines = config.data, []
    for split, path in (("train", data.questions), ("val", data.eval_questions)):
        lines.append(f"questions of {split}: {path or 'those of the store, if it has any'}")
    seen = "images and text" if config.embed.features == "both" else "the text alone"
    made = f"made by {config.embed.encoder} from {seen}"
    lines.append(f"embeddings: {data.query_embeddings or made}")
    if config.eval.checkpoint is not None:
        return [*lines, f"answers: {config.answerer.spec}, written to {config.eval.predictions}"]
    lines.append(f"RL starts from: {config.sft.checkpoint or 'SFT on beams that are searched'}")
    rolled = f"made by {config.answerer.spec}, and written to {data.rl_out} ({data.rl_reader})"
    return [*lines, f"RL data: {data.rl_data[0] if data.rl_data else rolled}"]


def legacy_config(
    run: LegacyRun,
    root: Path,
    environment: Mapping[str, str],
    device: str,
    *,
    answerer: str | None = None,
    encoder: str | None = None,
) -> PipelineConfig:
    """The pipeline of a legacy call on ``device``; the rest as :class:`LegacyCall`.

    Raises:
        LeverError: something is missing that cannot be made; it names everything that is.
        UsageError: a name or a variable is not understood.
    """
    training = train_config(environment, device)
    call = LegacyCall(run, root, environment, answerer=answerer, encoder=encoder)
    return call.config(training) if run.version is None else call.inference(run.version, training)
