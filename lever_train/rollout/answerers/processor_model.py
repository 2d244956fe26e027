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
from lever_train.rollout.answerers.vision_language import Encoded, Generation, Spoken, spoken

# Compared with transformers on tiny models of their own. Others want torchvision (SmolVLM2,
# InternVL, LLaVA-OneVision: their processors have a video half) or have no chat (PaliGemma).
FAMILIES = ("llava", "idefics3", "gemma3")


class ProcessorModel:
    """A model with its processor; make one with :meth:`load`."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self.model = model.eval().to(device)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = device
        ends = model.generation_config.eos_token_id
        self._ends = list(ends) if isinstance(ends, list | tuple) else [ends]

    @classmethod
    def load(cls, name: str, device: str) -> ProcessorModel:
        """Load a model by its name or folder; bf16 on a GPU, float32 on the CPU.

        Raises:
            LeverError: it cannot be loaded, or has no chat template.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise LeverError(
                f"the model cannot be loaded ({type(error).__name__}: {error})",
                where=name,
                hint="name a folder or a model of the Hugging Face hub",
            ) from error
        if processor.chat_template is None:
            raise LeverError("the model has no chat template", where=name)
        return cls(model, processor, device)

    def encode(self, prompt: Prompt, template: Template) -> Encoded:
        """The turns of a prompt, and its token ids, which tell how long it is.

        Raises:
            OSError: an image cannot be read.
        """
        turns = tuple(template.turns(prompt))
        images = tuple(p.image for t in turns for p in t.parts if p.image is not None)
        return Encoded(self._inputs(turns)["input_ids"][0].tolist(), images, turns)

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
    def generate(self, batch: Sequence[Encoded], how: Generation) -> list[Spoken]:
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
        self, batch: Sequence[Encoded], given: Sequence[Sequence[str]]
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
        longer = dict(inputs)
        for name, beside in (("input_ids", said), ("token_type_ids", torch.zeros_like(said))):
            if name in inputs:  # the answer is text: of type 0
                longer[name] = torch.cat([inputs[name], beside], dim=1)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        # what predicts answer token t is the output before it; the first is the prompt's last
        logits: Tensor = self.model(**longer).logits[0, -len(ids) - 1 :].float().log_softmax(-1)
        spoken = sum(float(logits[step, token]) for step, token in enumerate(ids))
        return spoken + float(logits[-1, self._ends].logsumexp(-1))

    def _inputs(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """What the model is given, as its own processor lays it out."""
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image", "image": open_image(part.image)}
                    if part.image is not None
                    else {"type": "text", "text": part.text}
                    for part in turn.parts
                ],
            }
            for turn in turns
        ]
        found = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        moved: dict[str, Any] = found.to(self.device, dtype=self.model.dtype)
        return moved
