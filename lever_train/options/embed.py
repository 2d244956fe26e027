"""What the user asks of ``lever embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from lever_data.errors import UsageError
from lever_data.options import Section, option
from lever_data.vocabulary import DEFAULT_STORE, Dataset, Device, ImageName, ImageRoot, StorePath


class Encoding(Section):
    """How items become vectors."""

    encoder: str = option(
        "openai/clip-vit-base-patch32",
        "A CLIP or text encoder: a folder, package:NAME (the one an installed Python package "
        "holds), or a name that transformers knows.",
        everyday=True,
    )
    features: Literal["text", "image", "both"] = option(
        "both",
        "What is embedded; both: the sum of the two unit vectors, unit length.",
        everyday=True,
    )
    batch_size: int = option(64, "Items per batch.", ge=1)


class EmbedRequest(Encoding):
    """Embeddings of the items of one split."""

    store: StorePath = DEFAULT_STORE
    dataset: Dataset = None
    split: str = option("train", "Split of the items.", metavar="NAME", everyday=True)
    with_answers: bool = option(
        False, "Candidates are embedded with their answers, apart from the queries."
    )
    template: str | None = option(
        None,
        "What is read of an item in place of its question: words with {question}, {answer} and "
        "the {NAME} of texts in the store; it needs a --name.",
        everyday=True,
    )
    name: str | None = option(None, "Name in the store. Default: encoder and features.")
    image_root: ImageRoot = None
    image_name: ImageName = None
    allow_failed: bool = option(
        False, "An item whose image cannot be read gets a vector of zeros, and is counted."
    )
    device: Device = "cpu"
    out: Path | None = option(
        None,
        "Folder for query_embeddings.pt and candidate_embeddings.pt.",
        metavar="DIR",
        everyday=True,
    )

    @model_validator(mode="after")
    def _answers_are_text(self) -> Self:
        if self.with_answers and self.features == "image":
            raise UsageError("--with-answers changes the text, and --features image has none")
        return self

    @model_validator(mode="after")
    def _template_is_text(self) -> Self:
        if self.template is not None and (self.features == "image" or self.with_answers):
            raise UsageError(
                "--template says all of the text: it goes with --features text or both, and "
                "without --with-answers"
            )
        if self.template is not None and self.name is None:
            raise UsageError("vectors of a template need a --name", value=self.template)
        return self

    @property
    def images(self) -> Path | None:
        """The folder of the images: that named, else the store where it holds them."""
        from lever_data.store.pictures import pictures_of

        return pictures_of(self.store) if self.image_root is None else self.image_root

    def require_images(self) -> None:
        """Refuse to embed images from a folder that is not there.

        Raises:
            UsageError: it names the folder.
        """
        if self.features != "text" and (self.images is None or not self.images.is_dir()):
            raise UsageError(
                "images are needed",
                value=None if self.image_root is None else str(self.image_root),
                hint="--image-root DIR names the folder they lie in; --features text needs none",
            )
