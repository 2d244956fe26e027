"""A model in a folder, by content: what tells it from every other model.

In go the folder transformers loads a model from; out comes its name with a digest of its files.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from lever_data.errors import LeverError, UsageError
from lever_data.store.files import sha256_file

_PACKAGE = "package:"
_TEMPLATES = "additional_chat_templates"  # the one folder below that transformers reads
# no part of a model: documents, and what a trainer keeps beside it to go on from there
_BESIDE = (".md", ".pt", ".pth")
_READERS = 4  # hashing lets go of the interpreter: the shards of a model are read side by side


def model_folder(name: str) -> str:
    """The folder of the model that an installed package holds, of ``package:NAME``; any other name
    as it is.

    Raises:
        UsageError: the package is not installed, or does not hold exactly one ``config.json``.
    """
    if not name.startswith(_PACKAGE):
        return name
    package = name.removeprefix(_PACKAGE).replace("-", "_")
    spec = find_spec(package) if package.isidentifier() else None
    places = () if spec is None else spec.submodule_search_locations or ()
    if not places:
        raise UsageError("the package is not installed", value=name, hint=f"pip install {package}")
    found = sorted({path.parent for place in places for path in Path(place).rglob("config.json")})
    found = [folder for folder in found if any(folder.glob("*.safetensors"))]
    if len(found) != 1:
        raise UsageError(f"the package holds {len(found)} models, not one", value=name)
    return str(found[0])


def folder_identity(folder: Path) -> str:
    """``NAME@DIGEST``: the folder's own name and 12 digits of the sha256 of its files.

    All of them count but hidden ones, documents and a trainer's state: config, weights and their
    index, tokenizer, processor, chat template. Each is read whole, in bounded memory: 15 GB take
    some ten seconds.

    Raises:
        LeverError: a file cannot be read.
    """
    try:
        files = _files(folder)
        with ThreadPoolExecutor(_READERS) as readers:
            digests = list(readers.map(sha256_file, files))
    except OSError as error:
        raise LeverError(
            f"a file of the model cannot be read ({error.strerror})", where=str(error.filename)
        ) from error
    named = zip(files, digests, strict=True)
    joined = "".join(f"{path.relative_to(folder)}:{digest}\n" for path, digest in named)
    return f"{folder.absolute().name}@{hashlib.sha256(joined.encode()).hexdigest()[:12]}"


def _files(folder: Path) -> list[Path]:
    """Files that may change what the model says, in the order of their names."""
    found = [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")]
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix not in _BESIDE and not path.name.startswith(".")
    )
