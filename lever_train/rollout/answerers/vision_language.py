"""A local vision-language model: encode prompts, reuse vision features, generate, score answers.

In go prompts as template parts; out come texts and log-probabilities. The features of an image are
computed once and kept (demonstrations come again and again), and a prompt is read once for all the
answers whose probability is asked: its key-value cache serves them all. That needs a model of
:data:`FAMILIES`, whose image tokens can be laid out without its processor; that matters because
the composite processor does not construct where torchvision is missing.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lever_data.errors import LeverError
from lever_data.items.prompts import Prompt, Template, Turn
from lever_train.inputs.images import open_image

# Each compared with transformers given the pixels themselves. Others lay out images, positions or
# caches in ways of their own and would be answered wrongly without a word.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FEATURE_BYTES = 1 << 30  # vision features kept on the device
_READERS = 4  # threads that decode and resize images


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the model reads it: token ids with one id per image patch group, and its
    images in order; ``turns`` where its own processor lays it out."""

    ids: list[int]
    images: tuple[Path, ...]
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Generation:
    """How answers are generated."""

    max_new_tokens: int
    num_beams: int
    length_penalty: float


# A generated text, and whether the token limit ended it.
Spoken = tuple[str, bool]


def spoken(tokenizer: Any, tokens: Tensor, ends: Sequence[int]) -> list[Spoken]:
    """The texts of generated tokens [B, T]; one without an end token was cut at the limit."""
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        (text, not any(token in ends for token in row))
        for text, row in zip(texts, tokens.tolist(), strict=True)
    ]


@dataclass
class _Feature:
    tokens: Tensor  # [n, h], as they replace the image's placeholder tokens
    grid: Tensor  # [3] int64: frames, rows, columns of patches
    deep: list[Tensor]  # [n, h] each, added in the first layers; none but of Qwen3-VL

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(layer.nbytes for layer in self.deep)


class VisionLanguageModel:
    """A Qwen-VL model with its tokenizer and image processor; make one with :meth:`load`."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, device: str) -> None:
        self.model = model.eval().to(device)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.device = device
        self.image_token: int = model.config.image_token_id
        self._features: OrderedDict[Path, _Feature] = OrderedDict()
        self._kept_bytes = 0
        ends = model.generation_config.eos_token_id
        self._ends = list(ends) if isinstance(ends, list | tuple) else [ends]
        self._output: type = dict  # what the vision tower's features come in
        self._placing = inspect.signature(model.model.get_rope_index).parameters
        # transformers before 5 derive the token types themselves
        self._wants_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(cls, name: str, device: str) -> VisionLanguageModel:
        """Load a model by its name or folder; bf16 on a GPU, float32 on the CPU.

        Raises:
            LeverError: it cannot be loaded, or is of another family.
        """
        from transformers import AutoModelForImageTextToText

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        try:
            tokenizer, images = _load_processors(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise LeverError(
                f"the model cannot be loaded ({type(error).__name__}: {error})",
                where=name,
                hint="name a folder or a model of the Hugging Face hub",
            ) from error
        takes = inspect.signature(model.forward).parameters
        if model.config.model_type == "qwen3_vl" and "mm_encoder_outputs" not in takes:
            raise LeverError(
                "this transformers takes no deepstack features, without which the model is wrong",
                where=name,
                hint="transformers 5.23 does",
            )
        return cls(model, tokenizer, images, device)

    def encode(self, prompt: Prompt, template: Template) -> PromptTokens:
        """Token ids of the conversation, every image as many tokens as it has features.

        Raises:
            OSError: an image cannot be read.
        """
        turns = template.turns(prompt)
        messages = [{"role": t.role, "content": _content(t)} for t in turns]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        images = tuple(p.image for t in turns for p in t.parts if p.image is not None)
        counts = iter([len(self._feature(path).tokens) for path in images])
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (next(counts) if token == self.image_token else 1)
        return PromptTokens(ids, images)

    def read_images(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Compute the features of images not seen before; returns why some cannot be read."""
        todo = [p for p in dict.fromkeys(paths) if p not in self._features]
        failed: dict[Path, str] = {}
        with ThreadPoolExecutor(_READERS) as readers:
            for path, pixels in zip(todo, readers.map(self._pixels, todo), strict=True):
                if isinstance(pixels, str):
                    failed[path] = pixels
                else:
                    self._keep(path, *pixels)
        return failed

    @torch.inference_mode()
    def generate(self, batch: Sequence[PromptTokens], how: Generation) -> list[Spoken]:
        """What is generated for every prompt; prompts are padded on the left."""
        inputs = self._inputs(batch)
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=how.max_new_tokens,
            min_new_tokens=0,
            num_beams=how.num_beams,
            # without beams transformers warns about it
            **({"length_penalty": how.length_penalty} if how.num_beams > 1 else {}),
        )
        width = inputs["input_ids"].shape[1]
        return spoken(self.tokenizer, out[:, width:], self._ends)

    @torch.inference_mode()
    def log_probs(
        self, batch: Sequence[PromptTokens], given: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """Log-probability (nats) of generating exactly each given answer and then stopping."""
        inputs = self._inputs(batch)
        mask = inputs["attention_mask"]
        positions, deltas = self._positions(inputs)
        shown = {"inputs_embeds", "mm_encoder_outputs"} & inputs.keys()
        if "inputs_embeds" not in shown:
            shown.add("input_ids")
        read = self.model(
            **{name: inputs[name] for name in shown},
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        rows = [i for i, answers in enumerate(given) for _ in answers]
        if not rows:
            return [() for _ in given]
        index = torch.tensor(rows, device=self.device)
        tokens, real = self._answers([a for answers in given for a in answers])
        cache = read.past_key_values
        cache.batch_select_indices(index)
        full = torch.cat([mask[index], real.to(mask.dtype)], dim=1)
        after = (full.cumsum(-1) - 1)[:, mask.shape[1] :] + deltas[index]
        logits = self.model(
            input_ids=tokens,
            attention_mask=full,
            position_ids=after[None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        # what predicts answer token t is the output before it; the first is the prompt's last
        steps = torch.cat([read.logits[index], logits], dim=1).float().log_softmax(-1)
        return _grouped(self._sequence(steps, tokens, real), given)

    def _sequence(self, steps: Tensor, tokens: Tensor, real: Tensor) -> list[float]:
        """Sum over the answer's tokens plus the probability of any end token after them."""
        spoken = steps[:, :-1].gather(2, tokens[..., None])[..., 0]
        total = torch.where(real, spoken, 0.0).sum(-1)
        last = steps[torch.arange(len(steps), device=steps.device), real.sum(-1)]
        ends = torch.tensor(self._ends, device=steps.device)
        found: list[float] = (total + last[:, ends].logsumexp(-1)).tolist()
        return found

    def _answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Answers as tokens [M, T], padded on the right, and the mask of what is real."""
        ids = [self.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
        width = max(1, *(len(i) for i in ids))
        tokens = torch.tensor([i + [self._pad] * (width - len(i)) for i in ids])
        real = torch.arange(width) < torch.tensor([len(i) for i in ids])[:, None]
        return tokens.to(self.device), real.to(self.device)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self._ends[0])

    def _inputs(self, batch: Sequence[PromptTokens]) -> dict[str, Any]:
        """The batch padded on the left, with the vision features of its images."""
        width = max(len(e.ids) for e in batch)
        ids = torch.tensor([[self._pad] * (width - len(e.ids)) + e.ids for e in batch])
        lengths = torch.tensor([len(e.ids) for e in batch])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        ids, mask = ids.to(self.device), mask.to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        features = [self._feature(path) for e in batch for path in e.images]
        is_image = (ids == self.image_token) & mask.bool()
        if self._wants_types:
            inputs["mm_token_type_ids"] = is_image.int()
        if features:
            inputs["image_grid_thw"] = torch.stack([f.grid for f in features]).to(self.device)
        if features and features[0].deep:
            # embeddings alone would leave out what the first layers are given besides
            layers = zip(*(f.deep for f in features), strict=True)
            seen = self._output(
                pooler_output=[f.tokens for f in features],
                deepstack_features=[list(layer) for layer in layers],
            )
            inputs["mm_encoder_outputs"] = {"image": seen}
        elif features:
            embeds = self.model.get_input_embeddings()(ids)
            tokens = torch.cat([f.tokens for f in features]).to(embeds.dtype)
            inputs["inputs_embeds"] = embeds.masked_scatter(is_image[..., None], tokens)
        return inputs

    def _positions(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Positions [3, B, P] of the prompt's tokens, and [B, 1] what text after it adds to its
        own count."""
        mask = inputs["attention_mask"]
        if "image_grid_thw" not in inputs:
            plain = (mask.cumsum(-1) - 1).clamp(min=0)
            return plain[None].expand(3, -1, -1), torch.zeros_like(mask[:, :1])
        named = {k: v for k, v in inputs.items() if k in self._placing}
        positions, deltas = self.model.model.get_rope_index(**named)
        return positions, deltas

    def _feature(self, path: Path) -> _Feature:
        """The features of an image, computed where they were dropped since."""
        if path not in self._features:
            pixels = self._pixels(path)
            if isinstance(pixels, str):
                raise OSError(pixels)
            self._keep(path, *pixels)
        self._features.move_to_end(path)
        return self._features[path]

    def _pixels(self, path: Path) -> tuple[Tensor, Tensor] | str:
        """An image as the vision tower reads it: patches and grid; a text says why not."""
        try:
            out = self.image_processor(images=[open_image(path)], return_tensors="pt")
        except OSError as error:
            return f"{error.strerror}: {error.filename}"
        except ValueError as error:  # such as an image a hundred times wider than high
            return f"{error}: {path}"
        return out["pixel_values"], out["image_grid_thw"]

    @torch.inference_mode()
    def _keep(self, path: Path, pixels: Tensor, grid: Tensor) -> None:
        """Run the vision tower on one image and keep what it says, the oldest making room."""
        features = self.model.get_image_features(
            pixels.to(self.device, self.model.dtype), grid.to(self.device)
        )
        self._output = type(features)
        deep = [_joined(layer) for layer in getattr(features, "deepstack_features", None) or ()]
        pooled = getattr(features, "pooler_output", features)
        kept = _Feature(_joined(pooled), grid[0], deep)
        self._features[path] = kept
        self._kept_bytes += kept.nbytes
        while self._kept_bytes > FEATURE_BYTES and len(self._features) > 1:
            _, dropped = self._features.popitem(last=False)
            self._kept_bytes -= dropped.nbytes


def _content(turn: Turn) -> str | list[dict[str, Any]]:
    """What a chat template is given of a turn: parts where the user speaks, else a text."""
    if turn.role != "user":
        return turn.text
    return [
        {"type": "image"} if p.image is not None else {"type": "text", "text": p.text}
        for p in turn.parts
    ]


def _load_processors(name: str) -> tuple[Any, Any]:
    """Tokenizer and image processor: the model's own processor, else its two parts."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        processor = AutoProcessor.from_pretrained(name)
    except ImportError:  # the video half of it wants torchvision
        return AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    tokenizer = processor.tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    return tokenizer, processor.image_processor


def _joined(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def _grouped(values: list[float], given: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    left = iter(values)
    return [tuple(next(left) for _ in answers) for answers in given]
