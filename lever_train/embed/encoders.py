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
from lever_train.inputs.model_folder import folder_identity, model_folder

# Trained on texts padded to one length, most without a mask: shorter padding gives other vectors
# (a question at batch 64 and at batch 1 had cosine 0.38). Their processors document it.
_PADDED = ("siglip", "siglip2", "align")
_FULL_LENGTH = 64


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

        self.name = name = model_folder(name)
        try:
            # float32 whatever the file holds: in bfloat16 a vector depends on its batch
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            if model.config.is_encoder_decoder:
                model = model.get_encoder()
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
        kind = model.config.model_type
        self._full_length = min(_FULL_LENGTH, self._length()) if kind in _PADDED else None

    def identity(self) -> str:
        """What tells this encoder from another: the digest of its files, or its commit."""
        padded = "" if self._full_length is None else f" padded to {self._full_length}"
        folder = Path(self.name)
        if not folder.is_dir():
            commit = getattr(self._model.config, "_commit_hash", None)
            return f"{self.name}@{commit}{padded}"
        return folder_identity(folder) + padded

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, d] of texts; what exceeds the model's length is cut."""
        padded = self._full_length is not None
        tokens = self._tokenizer(
            list(texts),
            padding="max_length" if padded else True,
            padding_side=None if padded else "right",  # the side positions are counted from
            truncation=True,
            max_length=self._full_length or self._length(),
            return_attention_mask=None if padded else True,
            return_tensors="pt",
        ).to(self._device)
        tokens.pop("token_type_ids", None)
        if self._is_joint:
            return self._unit(self._model.get_text_features(**tokens))
        hidden = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return self._unit((hidden * mask).sum(1) / mask.sum(1))

    @torch.no_grad()
    def images(self, pictures: Sequence[Image]) -> Tensor:
        """Unit vectors [B, d] of pictures."""
        pixels = self._processor(images=list(pictures), return_tensors="pt").to(self._device)
        return self._unit(self._model.get_image_features(**pixels))

    def _unit(self, found: Any) -> Tensor:
        # transformers 5 wraps the projected features; older versions return the tensor
        features = getattr(found, "pooler_output", found)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise UsageError(
                "this encoder does not give one vector per item",
                value=type(self._model).__name__,
                hint="CLIP, SigLIP and their kin, or a text encoder",
            )
        return normalize(features.float(), dim=-1).cpu()

    def _length(self) -> int:
        config = getattr(self._model.config, "text_config", self._model.config)
        longest = self._tokenizer.model_max_length
        return int(min(longest, getattr(config, "max_position_embeddings", longest)))
