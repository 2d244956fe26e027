"""A local vision-language model through its own processor: one prompt at a time, nothing reused.

In go prompts as template turns; out come texts and log-probabilities. What is right for any model
that transformers can be given text and images for, and slow: pixels go through the vision tower
with every prompt and, for log-probabilities, with every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.items.prompts import Prompt, Template, Turn
from lever_train.inputs.images import open_image
from lever_train.rollout.answerers.vision_language import Generation, PromptTokens, Spoken, spoken

# Each compared with transformers on a tiny model of its own
FAMILIES = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_onevision",
    "paligemma",
    "qwen3_5",
    "smolvlm",
)
_NO_CHAT = ("paligemma",)  # shown the turns one under the other


class ProcessorModel:
    """A model with its processor; make one with :meth:`load`."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self.model = model.eval().to(device)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = device
        ends = model.generation_config.eos_token_id
        self._ends = list(ends) if isinstance(ends, list | tuple) else [ends]
        # an answer is text, of type 0; PaliGemma's prompts are 0 and what it says 1
        self._answer_type = int(model.config.model_type == "paligemma")

    @classmethod
    def load(cls, name: str, device: str) -> ProcessorModel:
        """Load a model by its name or folder; bf16 on a GPU, float32 on the CPU.

        Raises:
            LeverError: it cannot be loaded, or has no chat template.
        """
        from transformers import AutoModelForImageTextToText

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            processor = load_processor(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise LeverError(
                f"the model cannot be loaded ({type(error).__name__}: {error})",
                where=name,
                hint="name a folder or a model of the Hugging Face hub",
            ) from error
        if processor.chat_template is None and model.config.model_type not in _NO_CHAT:
            raise LeverError("the model has no chat template", where=name)
        return cls(model, processor, device)

    def encode(self, prompt: Prompt, template: Template) -> PromptTokens:
        """The turns of a prompt, and its token ids, which tell how long it is.

        Raises:
            OSError: an image cannot be read.
            LeverError: the model takes no prompt without an image.
        """
        turns = tuple(template.turns(prompt))
        images = tuple(p.image for t in turns for p in t.parts if p.image is not None)
        if not images and self.model.config.model_type in _NO_CHAT:
            raise LeverError(
                "the model answers only where it sees an image",
                value=self.model.config.model_type,
                hint="leave out --without-images",
            )
        return PromptTokens(self._inputs(turns)["input_ids"][0].tolist(), images, turns)

    def read_images(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Why some images cannot be read."""
        failed: dict[Path, str] = {}
        for path in dict.fromkeys(paths):
            try:
                open_image(path)
            except OSError as error:
                failed[path] = f"{error.strerror}: {error.filename}"
        return failed

    @torch.inference_mode()
    def generate(self, batch: Sequence[PromptTokens], how: Generation) -> list[Spoken]:
        """What is generated for every prompt."""
        found: list[Spoken] = []
        for one in batch:
            inputs = self._inputs(one.turns)
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=how.max_new_tokens,
                min_new_tokens=0,
                num_beams=how.num_beams,
                **({"length_penalty": how.length_penalty} if how.num_beams > 1 else {}),
            )
            tokens = out[:, inputs["input_ids"].shape[1] :]
            found += spoken(self.tokenizer, tokens, self._ends)
        return found

    @torch.inference_mode()
    def log_probs(
        self, batch: Sequence[PromptTokens], given: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """Log-probability (nats) of generating exactly each given answer and then stopping."""
        found = []
        for one, answers in zip(batch, given, strict=True):
            inputs = self._inputs(one.turns) if answers else {}
            found.append(tuple(self._log_prob(inputs, answer) for answer in answers))
        return found

    def _log_prob(self, inputs: dict[str, Any], answer: str) -> float:
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        said = torch.tensor([ids], dtype=torch.long, device=self.device)
        longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], said], dim=1))
        for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
            kind = torch.full_like(said, self._answer_type)
            longer[name] = torch.cat([inputs[name], kind], dim=1)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        # what predicts answer token t is the output before it; the first is the prompt's last
        logits: Tensor = self.model(**longer).logits[0, -len(ids) - 1 :].float().log_softmax(-1)
        spoken = sum(float(logits[step, token]) for step, token in enumerate(ids))
        return spoken + float(logits[-1, self._ends].logsumexp(-1))

    def _inputs(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """What the model is given, as its own processor lays it out."""
        pictures = [[open_image(p.image) for t in turns for p in t.parts if p.image is not None]]
        text = self._text(turns)
        start = self.tokenizer.bos_token  # some templates write it, some leave it to the tokenizer
        found = self.processor(
            text=[text],
            images=pictures if pictures[0] else None,
            add_special_tokens=start is None or not text.startswith(start),
            return_tensors="np",  # of tensors PaliGemma's makes arrays in a way numpy warns of
        ).convert_to_tensors("pt")
        found.pop("labels", None)  # PaliGemma's, for training
        moved: dict[str, Any] = found.to(self.device, dtype=self.model.dtype)
        return moved

    def _text(self, turns: Sequence[Turn]) -> str:
        if self.processor.chat_template is None:
            image = str(self.processor.image_token)
            return "\n".join(
                "".join(image if p.text is None else p.text for p in turn.parts) for turn in turns
            )
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image"}
                    if part.image is not None
                    else {"type": "text", "text": part.text}
                    for part in turn.parts
                ],
            }
            for turn in turns
        ]
        text: str = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return text


def load_processor(name: str) -> Any:
    """The processor of a model, for images and text alone: a processor with a video half would
    want torchvision. Raises what transformers raises where there is none."""
    from transformers import (
        PROCESSOR_MAPPING,
        AutoConfig,
        AutoProcessor,
        Idefics3Processor,
        ProcessorMixin,
    )

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers before 5: whole, or not at all
        return AutoProcessor.from_pretrained(name)
    config = AutoConfig.from_pretrained(name)
    # SmolVLM's own differs in what it says of videos, for which it wants num2words
    kind = Idefics3Processor if config.model_type == "smolvlm" else PROCESSOR_MAPPING[type(config)]
    return without_videos(kind).from_pretrained(name)


def without_videos(kind: Any) -> Any:
    """A kind of processor without its video half, which stands after image and text."""
    attributes = kind.get_attributes()
    if "video_processor" not in attributes:
        return kind
    still = [name for name in attributes if name != "video_processor"]

    def from_args_and_dict(cls: Any, parts: list[Any], *more: Any, **named: Any) -> Any:
        return kind.from_args_and_dict.__func__(cls, [*parts, None], *more, **named)

    return type(
        kind.__name__,
        (kind,),
        {
            "get_attributes": staticmethod(lambda: still),
            "from_args_and_dict": classmethod(from_args_and_dict),
        },
    )
