"""``load``: the folder that ``lever pack`` wrote, as a selector that a program asks.

What is in the folder is checked against the sha256 that its configuration names; nothing is
unpickled. Names of its files are here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from lever_data.errors import LeverError, reason
from lever_data.store.files import sha256_file
from lever_train.pack.cells import Cells
from lever_train.pack.packed import PackedSelector
from lever_train.rollout.policy import SelectorPolicy
from lever_train.selector.checkpoint import load_selector

FORMAT, MODEL_TYPE = 1, "lever_selector"
CONFIG, WEIGHTS, POOL, CARD = "config.json", "model.safetensors", "pool.parquet", "README.md"
CELLS = "cells.safetensors"  # where similar examples are looked for in the nearest cells only
VECTOR = "vector"  # a column of the pool; `vector:NAME` of a further space
_ENTRIES = {"name", "files", "pool_size", "encoder", "features"}
_HUB = "hub:"


def load(folder: str | Path) -> PackedSelector:
    """Load what ``lever pack`` wrote: a folder, or ``hub:OWNER/NAME``, fetched from a hub once.

    Raises:
        LeverError: a file is missing, of another format, or not the one that was packed; the hub
            does not give it.
    """
    folder = _fetched(str(folder)) if str(folder).startswith(_HUB) else Path(folder)
    try:
        said = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise LeverError(
            f"the folder holds no packed selector ({reason(error)})",
            where=str(folder),
            hint="lever pack CHECKPOINT --out DIR makes one",
        ) from None
    kind = said.get("model_type") if isinstance(said, dict) else None
    if kind != MODEL_TYPE:
        raise LeverError("this is a model for another task", where=str(folder / CONFIG), value=kind)
    if said.get("format") != FORMAT:
        raise LeverError("the pack is of another format", where=str(folder / CONFIG))
    files = said.get("files")
    whole = said.keys() >= _ENTRIES and isinstance(files, dict) and {WEIGHTS, POOL} <= files.keys()
    if not whole:
        raise LeverError(
            "the pack's configuration lacks an entry",
            where=str(folder / CONFIG),
            hint=f"there are {', '.join(sorted(_ENTRIES))}; pack the checkpoint again",
        )
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise LeverError(
                "a file of the pack is missing or is not the one that was packed",
                where=str(folder / name),
                hint="copy the whole folder anew, or pack the checkpoint again",
            )
    selector, _ = load_selector(folder / WEIGHTS)
    table = pq.read_table(folder / POOL)
    vectors = {
        name.partition(":")[2]: _matrix(table.column(name))
        for name in table.column_names
        if name.partition(":")[0] == VECTOR
    }
    features = None
    if selector.config.pair_features:
        # here: DuckDB is for selectors of features alone
        from lever_train.pack.features import PackedFeatures

        spaces = {name: found for name, found in vectors.items() if name}
        features = PackedFeatures.read(selector.config, said["features"], spaces)
    return PackedSelector(
        SelectorPolicy(said["name"], selector.double()),
        table.select([n for n in table.column_names if n.partition(":")[0] != VECTOR]),
        vectors[""],
        pool_size=said["pool_size"],
        encoder=said["encoder"],
        features=features,
        cells=Cells(**load_file(folder / CELLS)) if CELLS in said["files"] else None,
    )


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix(_HUB)))
    except (OSError, ValueError) as error:  # of the network, and of a name that is none
        raise LeverError(
            f"the hub does not give this selector ({str(error).splitlines()[0]})", where=name
        ) from None


def _matrix(column: pa.ChunkedArray) -> Tensor:
    flat = column.combine_chunks().flatten().to_numpy()
    return torch.from_numpy(flat.reshape(len(column), -1).copy())
