"""A local causal language model: prompts of text alone, in batches padded on the left.

In go prompts, out come texts and log-probabilities. A model whose tokenizer has a chat template is
asked as a chat, unless the task is to be continued as a text (``--api completions``); a text ends
at the first stop word, which is the end of the line where none is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lever_data.errors import LeverError, UsageError
from lever_data.items.prompts import Prompt, Template
from lever_train.rollout.answerers.vision_language import (
    Generation,
    PromptTokens,
    Spoken,
    spoken,
)


def is_causal(kind: str) -> bool:
    """Whether transformers knows this family as causal language models that see no images."""
    from transformers.models.auto import modeling_auto as known

    sees = kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not sees


@dataclass
class CausalModel:
    """A model with its tokenizer; make one with :meth:`load`.

    ``stop``: where a continued text ends; empty where the model is asked as a chat.
    """

    model: Any
    tokenizer: Any
    device: str
    stop: tuple[str, ...] = ()

    @classmethod
    def load(
        cls, name: str, device: str, *, as_chat: bool = True, stop: Sequence[str] = ()
    ) -> CausalModel:
        """Load a model by its name or folder; bf16 on a GPU, float32 on the CPU.

        Args:
            as_chat: ask it as a chat where its tokenizer has a template.
            stop: words that end a text; the end of the line where there are none.

        Raises:
            LeverError: it cannot be loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise LeverError(
                f"the model cannot be loaded ({type(error).__name__}: {error})",
                where=name,
                hint="name a folder or a model of the Hugging Face hub",
            ) from error
        is_chat = as_chat and tokenizer.chat_template is not None
        ends = () if is_chat else (*stop,) or ("\n",)
        return cls(model.eval().to(device), tokenizer, device, ends)

    def encode(self, prompt: Prompt, template: Template) -> PromptTokens:
        """Token ids of the conversation or of the text.

        Raises:
            UsageError: the prompt is to show images.
        """
        if template.images:
            raise UsageError(
                "this model sees no images",
                value=self.model.config.model_type,
                hint="--without-images, or a task with images = false",
            )
        if self.stop:
            ids = self.tokenizer(template.text(prompt))["input_ids"]
            ends = ids[-1:] and ids[-1] in self._ends  # some tokenizers end every text
            return PromptTokens(ids[:-1] if ends else ids, ())
        messages = [{"role": t.role, "content": t.text} for t in template.turns(prompt)]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return PromptTokens(self.tokenizer(text, add_special_tokens=False)["input_ids"], ())

    def read_images(self, paths: Sequence[Path]) -> dict[Path, str]:
        """None is looked at."""
        return {}

    @torch.inference_mode()
    def generate(self, batch: Sequence[PromptTokens], how: Generation) -> list[Spoken]:
        """What is generated for every prompt; prompts are padded on the left."""
        width = max(len(one.ids) for one in batch)
        ids = [[self._pad] * (width - len(one.ids)) + one.ids for one in batch]
        mask = [[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in batch]
        beams: dict[str, Any] = {"length_penalty": how.length_penalty} if how.num_beams > 1 else {}
        out = self.model.generate(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            do_sample=False,
            max_new_tokens=how.max_new_tokens,
            min_new_tokens=0,
            num_beams=how.num_beams,
            pad_token_id=self._pad,
            **beams,
        )
        said = spoken(self.tokenizer, out[:, width:], self._ends)
        return [self._ended(text, cut=cut) for text, cut in said]

    def _ended(self, text: str, *, cut: bool) -> Spoken:
        """A continued text up to its first stop word, which ends it before the token limit."""
        begun = text.lstrip() if self.stop else text
        found = [at for word in self.stop if (at := begun.find(word)) >= 0]
        return (begun[: min(found)], False) if found else (text, cut)

    @torch.inference_mode()
    def log_probs(
        self, batch: Sequence[PromptTokens], given: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """Log-probability (nats) of generating exactly each given answer and then ending: a chat
        by any of its end tokens, a text by its first stop word after a space and the answer."""
        return [
            tuple(self._log_prob(one.ids, answer) for answer in answers)
            for one, answers in zip(batch, given, strict=True)
        ]

    def _log_prob(self, before: list[int], answer: str) -> float:
        # one at a time: the same figure whatever else is asked
        text = f" {answer}{self.stop[0]}" if self.stop else answer
        said = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before + said], device=self.device)
        # what predicts a token is the output before it; the first is the prompt's last
        logits = self.model(input_ids=ids).logits[0, len(before) - 1 :].float().log_softmax(-1)
        total = sum(float(logits[step, token]) for step, token in enumerate(said))
        return total if self.stop else total + float(logits[-1, self._ends].logsumexp(-1))

    @property
    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return list(ends) if isinstance(ends, list | tuple) else [ends]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self._ends[0] if pad is None else pad)
