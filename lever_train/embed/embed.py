"""``embed``: vectors of a split's items through an encoder, into the store and legacy files.

In go an :class:`EmbedRequest`; out come runs of kind ``embeddings`` and, where asked, the legacy
``query_embeddings.pt`` and ``candidate_embeddings.pt``. Work is done in parts of fixed rows; a
finished part is on disk, and a killed call goes on at the first missing one.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lever_data.errors import LeverError, UsageError
from lever_data.items.items import ITEM_RELATIONS, Place, load_items, only_dataset
from lever_data.items.prompts import Item
from lever_data.paths import store_name
from lever_data.readers.vectors import embedding_batches
from lever_data.relations.db import connect
from lever_data.store.files import write_atomic
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run, RunSpec, Store
from lever_train.embed.encoders import Encoder
from lever_train.inputs.actors import spread
from lever_train.inputs.images import open_image, shown_bytes
from lever_train.options.embed import EmbedRequest
from lever_train.options.engine import Engine

PART_ROWS = 512
_BLANK = Image.new("RGB", (32, 32))  # in the place of an image that cannot be read
_SAME = 0.99  # cosine of a vector with itself, made on another machine or in half precision
_READERS = 4  # threads that read and hash image files
_FIELD = re.compile(r"\{(\w+)\}")
Progress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class EmbedResult:
    """What was made: the run of the queries, that of the candidates (the same where they do not
    differ), whether each is new, the legacy files, and why items have no vector, by index."""

    queries: Run
    candidates: Run
    is_new: bool
    files: tuple[Path, ...]
    failed: dict[int, str]


def embed(
    request: EmbedRequest,
    progress: Progress = lambda done, total, note: None,
    engine: Engine | None = None,
) -> EmbedResult:
    """Embed the items of a split, here or by workers on Ray.

    Raises:
        UsageError: the request contradicts itself, or the encoder cannot be loaded.
        LeverError: the store lacks the items, or an image cannot be read.
    """
    task = _open(request, progress)
    queries, new_queries = task.run("query", engine or Engine())
    candidates, new_candidates = queries, False
    if request.with_answers:
        candidates, new_candidates = task.run("candidate", engine or Engine())
    return EmbedResult(
        queries,
        candidates,
        new_queries or new_candidates,
        _legacy_files(request.out, (queries, candidates)),
        {index: task.reason(index) for index in queries.details.get("failed", ())},
    )


def require_same_space(request: EmbedRequest, path: Path, count: int = 8) -> None:
    """Refuse vectors of queries that the encoder of ``request`` did not make: those of another
    split, made with it, would be compared with them. The first ``count`` queries are embedded.

    Raises:
        LeverError: another width, or a cosine below 0.99.
    """
    from lever_train.inputs.embeddings import load_embeddings

    task = _open(request, lambda done, total, note: None)
    texts = [item.question for item in task.items[:count]]
    made = task.encode(slice(0, len(texts)), texts)
    given = load_embeddings(str(path), connect(task.store, only=["embeddings"]))[: len(texts)]
    what = None
    if given.shape != made.shape:
        what = f"{given.shape[1]} numbers a vector, the encoder gives {made.shape[1]}"
    elif (cosine := float((normalize(given, dim=-1) * made).sum(-1).min())) < _SAME:
        what = f"the cosine of the same query is {cosine:.2f}"
    if what is not None:
        raise LeverError(
            f"the encoder did not make the given embeddings: {what}",
            where=str(path),
            value=f"{request.encoder}, features {request.features}",
            hint="--encoder names the one that did; or give embeddings of the eval split, too",
        )


def _open(request: EmbedRequest, progress: Progress) -> _Task:
    request.require_images()
    store = Store.open(request.store)
    con = connect(store, only=ITEM_RELATIONS)
    place = Place(
        request.dataset or only_dataset(con), request.split, request.images, request.image_name
    )
    found = load_items(con, place, None)
    items = [found[number] for number in sorted(found)]
    _require_whole(items)
    encoder = Encoder(request.encoder, request.device, images=request.features != "text")
    return _Task(request, store, place, items, encoder, progress)


def fill(
    template: str, items: Sequence[Item], con: duckdb.DuckDBPyConnection, place: Place
) -> list[str]:
    """The template's words of every item.

    Raises:
        LeverError: the store has no text of a name, or not one for every item.
        UsageError: the template names nothing of the item.
    """
    names = dict.fromkeys(_FIELD.findall(template))
    if not names:
        raise UsageError("the template reads nothing of an item", value=template)
    said = {name: item_texts(name, items, con, place) for name in names}
    return [
        _FIELD.sub(lambda field: said[field[1]][row], template).strip()  # noqa: B023
        for row in range(len(items))
    ]


def item_texts(
    name: str, items: Sequence[Item], con: duckdb.DuckDBPyConnection, place: Place
) -> Sequence[str]:
    """The question, the shown answer or a stored text of every item."""
    if name == "question":
        return [item.question for item in items]
    if name == "answer":
        return [item.answer or "" for item in items]
    sql = "select text from texts where dataset = ? and split = ? and name = ? order by example_id"
    key = [place.dataset, place.split, name]
    found = [text for (text,) in con.cursor().execute(sql, key).fetchall()]
    if len(found) != len(items):
        raise LeverError(
            f"the store has {len(found):,} texts of this name, the split has {len(items):,} items",
            where=f"{place.dataset}/{place.split}",
            value=name,
            hint=f"`lever ingest TEXTS.json --name {name}`: a JSON list, one text an item",
        )
    return found


@dataclass(frozen=True)
class _Task:
    request: EmbedRequest
    store: Store
    place: Place
    items: Sequence[Item]
    encoder: Encoder
    progress: Progress

    def texts(self, role: str) -> list[str]:
        """What is read of every item."""
        if role == "candidate":
            return [f"Question:{i.question} Short answer:{i.answer or ''}" for i in self.items]
        if self.request.template is not None:
            con = connect(self.store, only=["texts"])
            return fill(self.request.template, self.items, con, self.place)
        return [item.question for item in self.items]

    def run(self, role: str, engine: Engine) -> tuple[Run, bool]:
        """The run of one role and whether this call made it."""
        texts = self.texts(role)
        spec, name = self._spec(role, texts)
        if (known := self.store.find(spec)) is not None:
            return known, False
        folder = self.store.path / "jobs" / f"{spec.run_id()}-b{self.request.batch_size}"
        if engine.engine == "ray":
            self._spread(folder, len(texts), role, engine)
        parts = [
            self._part(folder, start, texts, role) for start in range(0, len(texts), PART_ROWS)
        ]
        values = np.concatenate(parts)
        dataset, split = self.place.dataset, self.place.split
        with self.store.begin(spec) as writer:
            for batch in embedding_batches(values, dataset, split, name, self.request.encoder):
                writer.write("embeddings", batch)
            failed = np.flatnonzero(~values.any(axis=1)).tolist()
            details = {"name": name, "width": values.shape[1], "dtype": "float32"}
            run = writer.commit(details | {"failed": failed} if failed else details)
        shutil.rmtree(folder)
        return run, True

    def _spec(self, role: str, texts: Sequence[str]) -> tuple[RunSpec, str]:
        request = self.request
        short = request.encoder.rstrip("/").rsplit("/", 1)[-1]
        name = request.name or f"{short}-{request.features}"
        name = name if role == "query" else f"{name}-answered"
        shown = repr(list(zip(texts, self._image_digests, strict=True)))
        spec = RunSpec(
            kind="embeddings",
            dataset=self.place.dataset,
            split=self.place.split,
            source={"path": request.encoder},
            source_sha256=hashlib.sha256(shown.encode()).hexdigest(),
            parameters={
                "name": name,
                "encoder": self.encoder.identity(),
                "features": request.features,
            }
            | ({} if request.template is None else {"template": request.template}),
        )
        return spec, name

    @cached_property
    def _image_digests(self) -> list[str | None]:
        """sha256 of every item's image, each file read once; ``None`` where none is looked at."""
        if self.request.features == "text":
            return [None] * len(self.items)
        paths = [_image(item) for item in self.items]
        distinct = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(_READERS) as readers:
            known = dict(zip(distinct, readers.map(self._digest, distinct), strict=True))
        return [known[path] for path in paths]

    def _digest(self, path: Path) -> str:
        """sha256 of what is seen of an image; nothing is where it cannot be read."""
        try:
            return hashlib.sha256(shown_bytes(path)[0]).hexdigest()
        except OSError as error:
            self._refuse(error)
            return ""

    def _picture(self, path: Path) -> Image.Image | None:
        try:
            return open_image(path)
        except OSError as error:
            self._refuse(error)
            return None

    def _refuse(self, error: OSError) -> None:
        """Stop for an image that cannot be read, unless the user wants to go on without it."""
        if not self.request.allow_failed:
            raise LeverError(
                f"an image cannot be read ({error.strerror})",
                where=str(error.filename),
                hint="--allow-failed gives items without an image a vector of zeros, and counts "
                "them",
            ) from None

    def reason(self, index: int) -> str:
        """Why an item has no vector."""
        try:
            open_image(_image(self.items[index]))
        except OSError as error:
            return f"{error.strerror}: {error.filename}"
        return "its image could not be read when it was embedded"

    def _part(self, folder: Path, start: int, texts: Sequence[str], role: str) -> np.ndarray:
        """Rows of one part [≤ PART_ROWS, d] float32, from disk where they are there."""
        path = _part_path(folder, start)
        stop = min(start + PART_ROWS, len(texts))
        if path.exists():
            done = np.load(path, allow_pickle=False)
        else:
            done = self.encode(slice(start, stop), texts).numpy()
            _keep(path, done)
        self.progress(stop, len(texts), role)
        return np.asarray(done)

    def _spread(self, folder: Path, count: int, role: str, engine: Engine) -> None:
        """Have the parts made that are not there; their rows come back and are kept here."""
        starts = range(0, count, PART_ROWS)
        rows = [{"start": start} for start in starts if not _part_path(folder, start).exists()]
        given = (self.request, store_name(self.store.path), role)
        for done, row in enumerate(spread(PartWorker, given, rows, engine), 1):
            _keep(_part_path(folder, row["start"]), row["vectors"])
            self.progress(min(count, done * PART_ROWS), count, role)

    def encode(self, rows: slice, texts: Sequence[str]) -> Tensor:
        """Unit vectors [rows, d] of these items and their texts."""
        size, found, order = self.request.batch_size, [], list(range(rows.start, rows.stop))
        if self.request.features != "image":
            # every text of a batch is padded to its longest: short ones together are 0.6 of the
            # tokens on OK-VQA
            order.sort(key=lambda row: len(texts[row]))
        for first in range(0, len(order), size):
            part = order[first : first + size]
            vectors, opened = [], list[Image.Image | None]()
            if self.request.features != "image":
                vectors.append(self.encoder.texts([texts[row] for row in part]))
            if self.request.features != "text":
                opened = [self._picture(_image(self.items[row])) for row in part]
                vectors.append(self.encoder.images([p or _BLANK for p in opened]))
            joined = normalize(torch.stack(vectors).sum(0), dim=-1)
            joined[[n for n, picture in enumerate(opened) if picture is None]] = 0
            found.append(joined)
        return torch.cat(found)[torch.tensor(order).argsort()]


class PartWorker:
    """An actor that embeds parts: of the request, in the store of this address."""

    def __init__(self, request: EmbedRequest, store: str, role: str) -> None:
        self.task = _open(request.but(store=store), lambda done, total, note: None)
        self.texts = self.task.texts(role)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its vectors, [≤ PART_ROWS, d] float32."""
        start = int(row["start"])
        stop = min(start + PART_ROWS, len(self.texts))
        return {"start": start, "vectors": self.task.encode(slice(start, stop), self.texts).numpy()}


def _part_path(folder: Path, start: int) -> Path:
    return folder / f"part-{start // PART_ROWS:06d}.npy"


def _keep(path: Path, vectors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    write_atomic(path, buffer.getvalue())


def _image(item: Item) -> Path:
    if item.image is None:
        raise LeverError("an item has no image", where=f"item {item.example_id}")
    return item.image


def _require_whole(items: Sequence[Item]) -> None:
    """Row = index of the item, so every index must be there."""
    for row, item in enumerate(items):
        if item.example_id != row:
            raise LeverError(
                "an item of the split is not in the store",
                where=f"item {row}",
                hint="ingest the questions of the whole split",
            )


def _legacy_files(out: Path | None, runs: tuple[Run, Run]) -> tuple[Path, ...]:
    """``query_embeddings.pt`` and ``candidate_embeddings.pt``: bare tensors [n, d] float32."""
    if out is None:
        return ()
    import pyarrow.parquet as pq

    require_intact(runs)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for role, run in zip(("query", "candidate"), runs, strict=True):
        table = pq.read_table(run.table_files("embeddings"), columns=["vector"])
        flat = table.column("vector").combine_chunks().flatten().to_numpy()
        tensor = torch.from_numpy(flat.reshape(table.num_rows, -1).copy())
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        path = out / f"{role}_embeddings.pt"
        write_atomic(path, buffer.getvalue())
        paths.append(path)
    return tuple(paths)
