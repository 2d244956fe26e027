"""Text and image encoders through transformers: CLIP and its kin, or a plain text encoder.

In go texts or pictures, out come unit vectors [B, d] float32. A CLIP model projects both into
one space; of a text encoder the last hidden states are averaged over the tokens (the pooling of
the sentence-transformers models).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from lever_data.errors import UsageError
from lever_train.inputs.devices import open_device
from lever_train.inputs.model_folder import folder_identity


class Encoder:
    """A loaded encoder.

    Args:
        name: a folder or a name that transformers knows.
        device: where it runs.
        images: whether images will be asked for.

    Raises:
        UsageError: there is no such encoder, or it has no image tower where one is needed.
    """

    def __init__(self, name: str, device: str, *, images: bool) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.name = name
        try:
            model = AutoModel.from_pretrained(name)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._is_joint = hasattr(model, "get_text_features")
            if images and not self._is_joint:
                raise UsageError(
                    "this encoder has no image tower", value=name, hint="--features text"
                )
            self._processor: Any = AutoImageProcessor.from_pretrained(name) if images else None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the encoder cannot be loaded ({str(error).splitlines()[0]})",
                value=name,
                hint="a folder with config.json, weights, tokenizer and image processor, or a "
                "name such as openai/clip-vit-base-patch32",
            ) from None
        self._device = open_device(device)
        self._model = model.to(self._device).eval()

    def identity(self) -> str:
        """What tells this encoder from another: the digest of its files, or its commit."""
        folder = Path(self.name)
        if not folder.is_dir():
            commit = getattr(self._model.config, "_commit_hash", None)
            return f"{self.name}@{commit}"
        return folder_identity(folder)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, d] of texts; what exceeds the model's length is cut."""
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._length(),
            return_tensors="pt",
        ).to(self._device)
        tokens.pop("token_type_ids", None)
        if self._is_joint:
            return _unit(self._model.get_text_features(**tokens))
        hidden = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return _unit((hidden * mask).sum(1) / mask.sum(1))

    @torch.no_grad()
    def images(self, pictures: Sequence[Image]) -> Tensor:
        """Unit vectors [B, d] of pictures."""
        pixels = self._processor(images=list(pictures), return_tensors="pt").to(self._device)
        return _unit(self._model.get_image_features(pixel_values=pixels["pixel_values"]))

    def _length(self) -> int:
        config = getattr(self._model.config, "text_config", self._model.config)
        return int(min(self._tokenizer.model_max_length, config.max_position_embeddings))


def _unit(found: Any) -> Tensor:
    # transformers 5 wraps the projected features; older versions return the tensor
    features = getattr(found, "pooler_output", found)
    return normalize(features.float(), dim=-1).cpu()
