"""``pack``: a checkpoint with the examples it may show, as a folder that needs no store; and
``select``, the picks of one, packed or not.

In go a :class:`PackRequest`; out comes the folder: weights as safetensors, the examples with their
vectors as Parquet, what they are of as JSON, and a card with the figures. It is laid out as models
on a hub are, so that its tools push and fetch it as it stands.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import duckdb
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch.nn.functional import normalize

from lever_data import __version__
from lever_data.errors import LeverError, UsageError
from lever_data.items.items import ITEM_RELATIONS, only_dataset
from lever_data.items.task import stored_task
from lever_data.relations.db import connect
from lever_data.relations.features import cosines_read, find_features
from lever_data.store.files import fsync_tree, sha256_file
from lever_data.store.store import Store
from lever_train.inputs.embeddings import load_embeddings
from lever_train.options.pack import PackRequest, SelectRequest
from lever_train.pack.cells import Cells
from lever_train.pack.features import PackedFeatures, Vectors
from lever_train.pack.inputs import Inputs
from lever_train.pack.load import (
    CARD,
    CELLS,
    CONFIG,
    FORMAT,
    MODEL_TYPE,
    POOL,
    VECTOR,
    WEIGHTS,
    load,
)
from lever_train.pack.packed import PackedSelector, Pick
from lever_train.rollout.policy import SelectorPolicy, load_policy
from lever_train.selector.checkpoint import Checkpoint, read_checkpoint


def pack(request: PackRequest) -> Path:
    """Write the folder, whole or not at all; returns it.

    Raises:
        UsageError: the folder is there already, the dataset or vectors are not named.
        LeverError: the vectors are not those of the examples, or of another width.
    """
    if request.out.exists():
        raise UsageError("--out is there already", value=str(request.out), hint="name another")
    store = Store.open(request.store)
    con = connect(store, only=[*ITEM_RELATIONS, "evaluation_scores"])
    dataset = request.dataset or only_dataset(con)
    selector = open_selector(request)
    found = read_checkpoint(request.checkpoint)
    examples, name = selector.examples, selector.name
    temporary = request.out.with_name(f".{request.out.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        tensors = {key: value.contiguous() for key, value in found.tensors.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"selector": json.dumps(found.entry())})
        pool = examples.append_column(VECTOR, _column(selector.vectors.numpy()))
        features = selector.features
        for space, values in features.spaces.items() if features else ():
            pool = pool.append_column(f"{VECTOR}:{space}", _column(values.numpy()))
        pq.write_table(pool, temporary / POOL, compression="zstd")
        files = [WEIGHTS, POOL]
        if cells := selector.cells:
            save_file({"centres": cells.centres, "cell": cells.cell}, temporary / CELLS)
            files.append(CELLS)
        said = {
            "model_type": MODEL_TYPE,
            "format": FORMAT,
            "lever_version": __version__,
            "name": name,
            "selector": found.entry(),
            "checkpoint": {
                "path": str(request.checkpoint), "sha256": sha256_file(request.checkpoint)
            },
            "dataset": dataset,
            "candidate_split": request.candidate_split,
            "task": stored_task(store.runs(), dataset, request.candidate_split).name,
            "pool_size": request.pool_size,
            "encoder": selector.encoder,
            "features": features.definitions() if features else {},
            "files": {n: sha256_file(temporary / n) for n in files},
        }  # fmt: skip
        card = _card(said, found, len(examples), _figures(con, store, name))
        (temporary / CARD).write_text(card)
        (temporary / CONFIG).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n")
        fsync_tree(temporary)
        temporary.replace(request.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return request.out


def open_selector(request: SelectRequest) -> PackedSelector:
    """The selector that ``lever pack`` would write, in memory.

    Raises:
        UsageError: the dataset or vectors are not named.
        LeverError: the vectors are not those of the examples, or of another width.
    """
    store = Store.open(request.store)
    con = connect(store, only=ITEM_RELATIONS)
    place = (request.dataset or only_dataset(con), request.candidate_split)
    policy = load_policy(request.checkpoint, "cpu")
    assert isinstance(policy, SelectorPolicy)
    vectors = load_embeddings(request.candidate_embeddings, con, place)
    features = None
    config = policy.selector.config
    if config.pair_features:
        asked = find_features(config.pair_features, store.path)
        spaces = {name: load_embeddings(name, con, place) for _, name in cosines_read(asked)}
        features = PackedFeatures(tuple(asked), spaces, config.votes)
    examples, dim = _examples(con, place), policy.selector.dim
    given = [vectors, *(features.spaces.values() if features else ())]
    if {len(examples)} != {*map(len, given)} or vectors.shape[1] != dim:
        shapes = " and ".join(str(list(some.shape)) for some in given)
        raise LeverError(
            "the vectors are not those of the examples, as the checkpoint takes them",
            where="/".join(place),
            value=f"vectors {shapes}, {len(examples)} examples of width {dim}",
        )
    return PackedSelector(
        policy,
        examples,
        vectors,
        pool_size=request.pool_size,
        encoder=_encoder(request, store, place),
        features=features,
        cells=Cells.of(normalize(vectors, dim=-1)) if request.cells else None,
    )


def select(
    selector: SelectRequest | PackedSelector | str | Path,
    inputs: Inputs,
    k: int | None = None,
    *,
    pools: npt.ArrayLike | None = None,
    spaces: Vectors | None = None,
) -> list[Pick] | list[list[Pick]]:
    """Choose demonstrations for questions; the picks are those of ``lever eval``.

    Args:
        selector: a checkpoint with its examples, a folder of ``lever pack``, or what
            :func:`open_selector` or ``lever_train.load`` gave, which reads nothing anew.
        inputs: one question or several: texts, items with the fields that the encoder's template
            names, or float vectors [d] or [B, d].
        k: how many; ``None``: the selector stops by itself, which kind ``stop`` can.
        pools: [B, K] ids of the examples each question may be shown, -1 where padded; in place of
            the ``pool_size`` most similar ones.
        spaces: by name the questions' vectors [B, d] in further spaces that features read.

    Returns:
        Picks in the order they are shown: a list for one question, a list of lists for several.

    Raises:
        UsageError: vectors of another width, a ``k`` that cannot be, or a text and no encoder.
        LeverError: the files do not fit, or a pool names an example that is not there.
    """
    if isinstance(selector, SelectRequest):
        selector = open_selector(selector)
    elif not isinstance(selector, PackedSelector):
        selector = load(selector)
    found: list[Pick] | list[list[Pick]] = selector.select(inputs, k, pools=pools, spaces=spaces)
    return found


def _examples(con: duckdb.DuckDBPyConnection, place: tuple[str, str]) -> pa.Table:
    sql = (
        "select example_id, question_id, image_id, question, answers, answer from examples "
        "where dataset = ? and split = ? order by example_id"
    )
    table: pa.Table = con.sql(sql, params=list(place)).to_arrow_table()
    if not len(table):
        raise LeverError(
            "the store holds no examples of this place",
            where="/".join(place),
            hint="lever ingest QUESTIONS --annotations FILE",
        )
    return table


def _column(vectors: Any) -> pa.Array:
    kind = pa.float32()
    flat = pa.array(vectors.ravel(), kind)
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _encoder(request: SelectRequest, store: Store, place: tuple[str, str]) -> dict[str, str] | None:
    """Name and identity of the encoder: the one named, else that of the vectors in the store."""
    for run in store.runs():
        if run.kind != "embeddings" or (run.dataset, run.split) != place:
            continue
        parameters = run.parameters
        if parameters.get("name") != request.candidate_embeddings or "encoder" not in parameters:
            continue
        if parameters.get("features") != "text":
            return None  # a text alone is not what such vectors are made of
        name = request.encoder or str(run.source["path"])
        template = str(parameters.get("template", "{question}"))
        return {"name": name, "identity": str(parameters["encoder"]), "template": template}
    if request.encoder is None:
        return None
    from lever_train.embed.encoders import Encoder

    found = Encoder(request.encoder, "cpu", images=False)
    return {"name": request.encoder, "identity": found.identity(), "template": "{question}"}


def _figures(con: duckdb.DuckDBPyConnection, store: Store, name: str) -> list[tuple[Any, ...]]:
    """Accuracies of the evaluations that this checkpoint took part in, with what it had to beat."""
    found: list[tuple[Any, ...]] = []
    for run in store.runs():
        names = run.parameters.get("selectors", {}) if run.kind == "evaluation" else {}
        if name in names.values():
            found += con.execute(_SCORES, [run.run]).fetchall()
    return found


_SCORES = """
    select run, dataset, split, selector, shots, num_queries, mean_accuracy
    from evaluation_scores
    where run = ?
    order by run, shots, mean_accuracy desc, selector
"""


def _card(
    said: dict[str, Any], found: Checkpoint, examples: int, figures: list[tuple[Any, ...]]
) -> str:
    """The card in Markdown: what it is, how to use it, figures with their runs."""
    rows = [
        f"| {run} | {dataset}/{split} | {selector} | {shots} | {n:,} | {accuracy:.4f} |"
        for run, dataset, split, selector, shots, n, accuracy in figures
    ]
    table = [
        "| run | questions | selector | shots | n | accuracy |",
        "|---|---|---|---:|---:|---:|",
        *rows,
    ]
    among = f"the {said['pool_size']} most similar" if said["pool_size"] else "all of them"
    encoder = said["encoder"]["name"] if said["encoder"] else "not named: give vectors"
    lines = [
        "---",
        "library_name: lever",
        "tags: [in-context-learning, demonstration-selection]",
        "---",
        "",
        f"# {said['name'].partition('@')[0]}: a selector of demonstrations",
        "",
        f"Kind `{found.config.selector}`, vectors of width {found.dim}, trained to phase "
        f"{found.phase}, epoch {found.epoch}. It picks from {examples:,} examples of "
        f"{said['dataset']}/{said['candidate_split']} (task {said['task']}), {among}. "
        f"Encoder: {encoder}.",
        "",
        "    import lever_train",
        "    selector = lever_train.load(FOLDER)",
        "    selector.select(vectors, k=2)",
        "",
        "## Evaluation",
        "",
        *(table if rows else ["No evaluation of this checkpoint is in the store it came from."]),
        "",
        f"Checkpoint sha256 {said['checkpoint']['sha256']}; lever {said['lever_version']}.",
        "",
    ]
    return "\n".join(lines)
