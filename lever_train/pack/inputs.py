"""What a packed selector is asked: vectors of questions, or texts through the pack's encoder.

In go what a program gives; out come vectors [B, d] float32, checked. transformers is imported when
the first text is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lever_data.errors import LeverError, UsageError, reason

_FIELD = re.compile(r"\{(\w+)\}")  # of a template

Inputs = str | dict[str, str] | Sequence[str | dict[str, str]] | npt.ArrayLike | Tensor


class Questions:
    """How questions become vectors: of width ``dim``, texts by ``encoder`` where it is known."""

    def __init__(self, dim: int, encoder: dict[str, str] | None) -> None:
        self.dim, self.encoder = dim, encoder
        self._encode: Any = None

    def vectors(self, inputs: Any) -> Tensor:
        """Vectors [B, d] of one question or several.

        Raises:
            UsageError: vectors of another width, not finite; a text that cannot be embedded.
            LeverError: the encoder is another than that of the pack.
        """
        if isinstance(inputs, str | dict):
            return self.texts([inputs])
        if is_texts(inputs):
            return self.texts(list(inputs))
        if isinstance(inputs, list | tuple) and not inputs:
            return torch.zeros(0, self.dim)
        return self.checked(inputs)

    def checked(self, given: Any) -> Tensor:
        """Vectors as they are, of one or several; see :meth:`vectors`."""
        if isinstance(given, Tensor):
            given = given.detach().cpu().float().numpy()
        try:
            with np.errstate(over="ignore"):  # seen below
                values = torch.from_numpy(np.array(given, dtype=np.float32))
        except (TypeError, ValueError) as error:  # ragged lists, words
            raise UsageError(
                f"vectors are numbers, equally many in each ({reason(error)})",
                hint="texts are strings alone",
            ) from None
        values = values[None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise UsageError(
                f"vectors of width {self.dim} are wanted",
                value=list(values.shape),
                hint="of the encoder that the selector was trained on",
            )
        if not bool(values.isfinite().all()):
            raise UsageError("a vector holds NaN or infinity")
        return values

    def texts(self, items: Sequence[str | dict[str, Any]]) -> Tensor:
        """Texts, or items with the fields of the encoder's template; see :meth:`vectors`."""
        if self.encoder is None:
            raise UsageError(
                "the pack names no encoder: give vectors", hint="lever pack --encoder NAME"
            )
        if self._encode is None:
            from lever_train.embed.encoders import Encoder

            encoder = Encoder(self.encoder["name"], "cpu", images=False)
            if encoder.identity() != self.encoder["identity"]:
                raise LeverError(
                    "the encoder is not the one that the pack was made with",
                    where=self.encoder["name"],
                    value=encoder.identity(),
                )
            self._encode = encoder.texts
        template = self.encoder.get("template", "{question}")
        given = [{"question": item} if isinstance(item, str) else item for item in items]
        for name in _FIELD.findall(template):
            if any(item.get(name) is None for item in given):
                raise UsageError(
                    f"the vectors are of the text {template!r}, and an item has no {name!r}",
                    hint=f"select({{{name!r}: …}}), or give vectors",
                )
        filled = [_FIELD.sub(lambda m: str(item[m[1]]), template).strip() for item in given]  # noqa: B023
        found: Tensor = self._encode(filled)
        return found


def is_texts(inputs: Any) -> bool:
    """Whether these are several questions in words."""
    return (
        isinstance(inputs, Sequence)
        and len(inputs) > 0
        and all(isinstance(t, str | dict) for t in inputs)
    )
