"""Answers from a local model through transformers: vision-language or language alone.

In go prompts, out come answers with the log-probabilities of the ground truth. Prompts are batched
by length. The answer to a prompt must not depend on what else is in the batch: the first batch is
answered once more one by one, and where that differs (bf16 does not promise it) everything is
answered one by one. Out of memory halves the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lever_data.errors import LeverError
from lever_data.items.prompts import Item, Prompt, Template
from lever_data.items.task import Task
from lever_train.inputs.model_folder import folder_identity
from lever_train.options.rollout import AnswererSpec
from lever_train.rollout.answerers.base import (
    Answer,
    ShownFingerprints,
    Usage,
    answer_of,
    scorer_name,
    template_of,
)
from lever_train.rollout.answerers.causal_language import CausalModel, is_causal
from lever_train.rollout.answerers.processor_model import FAMILIES as PLAIN
from lever_train.rollout.answerers.processor_model import ProcessorModel
from lever_train.rollout.answerers.vision_language import FAMILIES as REUSING
from lever_train.rollout.answerers.vision_language import (
    Generation,
    PromptTokens,
    Spoken,
    VisionLanguageModel,
)

SELF_TEST = 4  # prompts answered twice at the start
_BATCH = {"cpu": 4, "cuda": 32}
_LOG = logging.getLogger("lever.transformers")


LocalModel = VisionLanguageModel | ProcessorModel | CausalModel


def load_model(
    name: str, device: str, *, as_chat: bool = True, stop: Sequence[str] = ()
) -> LocalModel:
    """The model of a name or folder, in the way its family is answered; ``as_chat`` and ``stop``
    as :meth:`CausalModel.load` takes them.

    Raises:
        LeverError: there is no such model, or its family is not known.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise LeverError(
            f"the model cannot be loaded ({type(error).__name__}: {error})",
            where=name,
            hint="name a folder or a model of the Hugging Face hub",
        ) from error
    if kind in REUSING:
        return VisionLanguageModel.load(name, device)
    if kind in PLAIN:
        return ProcessorModel.load(name, device)
    if is_causal(kind):
        return CausalModel.load(name, device, as_chat=as_chat, stop=stop)
    raise LeverError(
        "this answerer does not know models of this family",
        where=name,
        value=kind,
        hint=f"it knows {', '.join((*REUSING, *PLAIN))} and causal language models; serve "
        "others with vLLM and use --answerer openai:URL",
    )


@dataclass
class TransformersAnswerer:
    """A model that is loaded when it is first asked. Make one with :meth:`load`."""

    model_name: str
    spec: AnswererSpec
    template: Template
    usage: Usage = field(default_factory=Usage)
    _model: LocalModel | None = None
    _batch: int = 0
    _tested: bool = False
    _shown: ShownFingerprints = field(default_factory=ShownFingerprints)

    @classmethod
    def load(
        cls, model_name: str, spec: AnswererSpec, task: Task | None = None
    ) -> TransformersAnswerer:
        """An answerer for a model of the hub or in a folder; nothing is loaded yet."""
        kind = spec.device.split(":")[0]
        template, batch = template_of(spec, task), spec.batch_size or _BATCH.get(kind, 4)
        if task is not None and not spec.stop:
            spec = spec.but(stop=task.stop)
        return cls(model_name, spec, template, _batch=batch)

    @cached_property
    def name(self) -> str:
        """The model's name and its prompt's."""
        return scorer_name(self._identity, self.spec, self.template)

    @cached_property
    def _identity(self) -> str:
        """The model's name without its owner; of a folder, its name and the digest of its files."""
        path = Path(self.model_name)
        return folder_identity(path) if path.is_dir() else path.name

    @property
    def batch_size(self) -> int:
        """Several batches at once, so that prompts of like length meet."""
        return max(self._batch, 1) * 8

    def generation(self) -> dict[str, Any]:
        """Prompt and parameters; a model in a folder is known by the digest of its files."""
        is_folder = Path(self.model_name).is_dir()
        text: dict[str, Any] = {"api": self.spec.api} if self.spec.api != "chat" else {}
        text |= {"stop": list(self.spec.stop)} if self.spec.stop else {}
        return text | {
            "generate": self.spec.generate,
            "dtype": "bfloat16" if self.spec.device.startswith("cuda") else "float32",
            "length_penalty": self.spec.length_penalty,
            "log_probs": self.spec.log_probs is not False,
            "max_new_tokens": self.spec.max_new_tokens,
            "model": self._identity if is_folder else self.model_name,
            "num_beams": self.spec.num_beams,
            "template": self.template.sha256()[:16],
        }

    def provenance(self) -> dict[str, Any]:
        """The model and the libraries that ran it."""
        versions = {"torch": torch.__version__, "transformers": version("transformers")}
        return {"model": self.model_name, "device": self.spec.device, **versions}

    def fingerprint(self, item: Item) -> bytes:
        """Digest of image, question and answer."""
        return self._shown.of(item)

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer prompts.

        Raises:
            LeverError: the model cannot be loaded.
        """
        if self._model is None:
            as_chat = self.spec.api == "chat"
            self._model = load_model(
                self.model_name, self.spec.device, as_chat=as_chat, stop=self.spec.stop
            )
        model = self._model
        answers: dict[int, Answer] = {}
        encoded: dict[int, PromptTokens] = {}
        failed = model.read_images([i for p in prompts for i in _images(p)])
        for index, prompt in enumerate(prompts):
            broken = next((failed[i] for i in _images(prompt) if i in failed), None)
            if broken is not None:
                answers[index] = Answer(None, error=f"an image cannot be read: {broken}")
            else:
                encoded[index] = model.encode(prompt, self.template)
                self.usage.prompt_tokens += len(encoded[index].ids)
        if self.spec.generate and not self._tested and len(encoded) > 1 and self._batch > 1:
            self._self_test(model, [encoded[i] for i in list(encoded)[:SELF_TEST]])
        todo = sorted(encoded, key=lambda i: len(encoded[i].ids))
        for indices, found, log_probs in self._batches(model, prompts, encoded, todo):
            for index, one, known in zip(indices, found, log_probs, strict=True):
                said = _OUT_OF_MEMORY if one is None else answer_of(one[0], cut=one[1])
                self.usage.cut += one is not None and one[1]
                answers[index] = said if said.text is None else replace(said, log_probs=known)
        self.usage.answers += len(encoded)
        return [answers[i] for i in range(len(prompts))]

    def _batches(
        self,
        model: LocalModel,
        prompts: Sequence[Prompt],
        encoded: dict[int, PromptTokens],
        todo: list[int],
    ) -> Iterator[tuple[list[int], Sequence[Spoken | None], Sequence[tuple[float, ...] | None]]]:
        """Batches of indices with what was said and log-probabilities; a batch that does not fit
        in memory is halved, and one prompt that does not fit alone has no text."""
        while todo:
            indices = todo[: self._batch]
            batch = [encoded[i] for i in indices]
            try:
                said: Sequence[Spoken | None] = [("", False)] * len(batch)
                if self.spec.generate:
                    said = model.generate(batch, self._how)
                log_probs: Sequence[tuple[float, ...] | None] = [None] * len(batch)
                if self.spec.log_probs is not False:
                    log_probs = model.log_probs(batch, [prompts[i].given for i in indices])
            except torch.OutOfMemoryError:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if len(indices) > 1:
                    self._batch = len(indices) // 2
                    _LOG.warning("out of memory: batches of %d from here on", self._batch)
                    continue
                said, log_probs = [None], [None]
            todo = todo[len(indices) :]
            yield indices, said, log_probs

    def _self_test(self, model: LocalModel, sample: list[PromptTokens]) -> None:
        """Batch 1 against batch N."""
        self._tested = True
        together = model.generate(sample, self._how)
        alone = [model.generate([one], self._how)[0] for one in sample]
        if together != alone:
            _LOG.warning(
                "answers depend on the batch (%d of %d differ): answering one by one",
                sum(a != b for a, b in zip(together, alone, strict=True)),
                len(sample),
            )
            self._batch = 1

    @property
    def _how(self) -> Generation:
        spec = self.spec
        return Generation(spec.max_new_tokens, spec.num_beams, spec.length_penalty)


_OUT_OF_MEMORY = Answer(None, error="the device has not enough memory for this prompt alone")


def _images(prompt: Prompt) -> list[Path]:
    items = (*prompt.demonstrations, prompt.query)
    return [item.image for item in items if item.image is not None]
