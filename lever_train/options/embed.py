"""What the user asks of ``lever embed``, as plain data. A field with ``help`` is an option."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lever_data.errors import UsageError

FEATURES = ("text", "image", "both")


def _help(text: str, **more: str) -> dict[str, str]:
    return {"help": text, **more}


@dataclass(frozen=True)
class EmbedRequest:
    """Embeddings of the items of one split."""

    store: Path
    encoder: str = field(
        default="openai/clip-vit-base-patch32",
        metadata=_help("A CLIP or text encoder: a folder, or a name that transformers knows."),
    )
    dataset: str | None = field(default=None, metadata=_help("Dataset of the items."))
    split: str = field(default="train", metadata=_help("Split of the items."))
    features: str = field(
        default="both",
        metadata=_help("text, image, or both (the sum of the two unit vectors, unit length)."),
    )
    with_answers: bool = field(
        default=False,
        metadata=_help("Candidates are embedded with their answers, apart from the queries."),
    )
    name: str | None = field(
        default=None, metadata=_help("Name in the store. Default: encoder and features.")
    )
    image_root: Path | None = field(
        default=None, metadata=_help("Folder of the images.", metavar="DIR")
    )
    allow_failed: bool = field(
        default=False,
        metadata=_help(
            "An item whose image cannot be read gets a vector of zeros, and is counted."
        ),
    )
    batch_size: int = field(default=64, metadata=_help("Items a batch."))
    device: str = field(default="cpu", metadata=_help("cpu, cuda or mps."))
    out: Path | None = field(
        default=None,
        metadata=_help(
            "Folder for query_embeddings.pt and candidate_embeddings.pt.", metavar="DIR"
        ),
    )

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: it says what.
        """
        if self.features not in FEATURES:
            raise UsageError("--features is text, image or both", value=self.features)
        if self.batch_size < 1:
            raise UsageError("--batch-size must be above 0", value=self.batch_size)
        if self.features != "text" and (self.image_root is None or not self.image_root.is_dir()):
            raise UsageError(
                "images are needed",
                value=None if self.image_root is None else str(self.image_root),
                hint="--image-root DIR names the folder they lie in; --features text needs none",
            )
        if self.with_answers and self.features == "image":
            raise UsageError("--with-answers changes the text, and --features image has none")
