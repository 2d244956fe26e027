"""One vocabulary: the options that several commands share, each defined once.

A model or a command that has one writes ``seed: Seed = 0``; flag, help and bounds come from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from lever_data.options import words
from lever_data.paths import store_path

DEFAULT_STORE = Path("lever-store")
STDOUT = Path("-")  # where a file is named, as in other tools

StorePath = Annotated[
    Path,
    AfterValidator(store_path),
    words(
        "The store: a folder, or s3://BUCKET/PREFIX (gs://, az://; hf:// to read).",
        "--store",
        metavar="DIR",
        env="LEVER_STORE",
        everyday=True,
    ),
]
RunNames = Annotated[
    tuple[str, ...], words("Only this run; a prefix that only it has will do.", "--run")
]
RunName = Annotated[str, words("The run, or a prefix that only it has.", "--run")]
SqlDir = Annotated[
    Path | None, words("Folder of your own .sql views, beside <store>/views/.", metavar="DIR")
]
JsonFile = Annotated[
    Path | None,
    words(
        "Write the result as JSON to FILE; - is stdout, in place of the table.",
        "--json",
        metavar="FILE|-",
        everyday=True,
        output=True,
    ),
]
HtmlFile = Annotated[
    Path | None,
    words("Write one self-contained page.", "--html", metavar="FILE", everyday=True, output=True),
]
Dataset = Annotated[str | None, words("Dataset of the rows.", metavar="NAME", everyday=True)]
Split = Annotated[str | None, words("Split of the rows.", metavar="NAME", everyday=True)]
Scorer = Annotated[str | None, words("Only candidates that this model answered.", metavar="MODEL")]
Limit = Annotated[int | None, words("Only the first N queries.", metavar="N", ge=1)]
Seed = Annotated[  # what SQL and torch both take
    int, words("Seed of all that is drawn at random.", metavar="N", le=2**63 - 1, ge=0)
]
Device = Annotated[str, words("Where models run: cpu, cuda, cuda:N or mps.")]

DryRun = Annotated[bool, words("Only say what would be done.", everyday=True)]
Vectors = Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)]
QueryEmbeddings = Annotated[
    Vectors,
    words(
        "Vectors of the queries: a .pt, .npy or .safetensors file, or a name in the store; "
        "row = query id. Several, joined by commas, stand side by side.",
        everyday=True,
    ),
]
CandidateEmbeddings = Annotated[
    Vectors,
    words(
        "Vectors of the demonstrations, likewise; row = example id. "
        "Without it the query embeddings serve.",
        everyday=True,
    ),
]
Pool = Annotated[
    Path | None,
    words(
        "A .npy file [n, K] of the example ids each query may be shown; row = query id. Without it "
        "the pools in the store count, else all examples.",
        metavar="FILE",
        everyday=True,
    ),
]
Questions = Annotated[
    Path | None,
    words("Official VQA questions of the split; else what the store holds.", metavar="FILE"),
]
Annotations = Annotated[
    Path | None, words("Official VQA annotations of the split.", metavar="FILE")
]
ImageRoot = Annotated[Path | None, words("Folder of the images.", metavar="DIR", everyday=True)]
ImageName = Annotated[
    str | None,
    words("Names the image files in place of what is stored: '{image_id}.jpg'.", metavar="PATTERN"),
]
Gates = Annotated[
    tuple[str, ...],
    words('A gate such as "fallback_share > 0.1": where one holds, the audit fails.', "--fail-on"),
]
