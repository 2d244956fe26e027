"""Ingest: source files in, committed runs out. One verb: :func:`ingest`.

Each source becomes one run (questions and annotations of one split become one together), in the
order of the arguments. What a file is, is told by its content. A run is committed whole or not at
all; the runs before a bad file stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from lever_data.errors import LeverError, UsageError
from lever_data.readers.detect import SourceFile, detect
from lever_data.readers.rows import data_files, is_rows, rows_of
from lever_data.readers.source import Source
from lever_data.sources.dataset import guessed_task, keep_pictures, meaning_of, read_dataset
from lever_data.sources.examples import commit_examples, further_parameters, stored_questions
from lever_data.sources.ingest_options import IngestOptions
from lever_data.sources.item_file import split_of
from lever_data.sources.questions import read_annotations, read_questions
from lever_data.sources.results import ingest_results
from lever_data.sources.rl_ingest import ingest_legacy
from lever_data.store.schema import TEXTS
from lever_data.store.spill import spill_folder
from lever_data.store.store import Run, RunSpec, Store

_UNNAMED = "default"  # the dataset of a store that has but one
__all__ = ["IngestOptions", "IngestResult", "ingest"]


@dataclass(frozen=True)
class IngestResult:
    """One run, and whether this call made it or found it there already."""

    run: Run
    is_new: bool


def ingest(
    paths: Sequence[str | Path], store: Store, options: IngestOptions | None = None
) -> Iterator[IngestResult]:
    """Ingest files one after another, yielding each run as it is committed.

    Raises:
        LeverError: a file is missing, broken or of no kind lever knows. It names the file; runs
            yielded before stay committed.
    """
    options = options or IngestOptions()
    _require_dataset(options, store)
    units = _units(paths, options)
    if options.columns.model_fields_set and not any(isinstance(u, Rows) for u in units):
        raise UsageError(
            "columns are named, and no file is a data set",
            value=", ".join(map(str, paths)),
            hint="JSON lines (.jsonl), CSV, Parquet, Arrow, or a folder of them",
        )
    for unit in units:
        if isinstance(unit, LeverError):
            raise unit
        if isinstance(unit, Rows):
            yield _ingest_rows(unit, store, options)
            continue
        first = unit[0]
        if first.kind in ("questions", "annotations", "items"):
            yield _ingest_examples(unit, store, options)
        elif first.kind == "results":
            yield _ingest_results(first, store, options)
        elif first.kind == "texts":
            yield _ingest_texts(first, store, options)
        elif first.kind in ("rl_data", "beam"):
            yield _ingest_legacy(first, store, options)
        else:
            yield _ingest_vectors(first, store, options)


def _units(
    paths: Sequence[str | Path], options: IngestOptions
) -> list[list[SourceFile] | Rows | LeverError]:
    """What becomes one run: a file, or a question file and its annotations.

    The error of a file that cannot be told apart stands in its place, to be raised in its turn.
    """
    units: list[list[SourceFile] | Rows | LeverError] = []
    for path in paths:
        try:
            if is_rows(Path(path)):
                units.append(_rows(Path(path), options))
                continue
            found = detect(Source.open(path))
        except LeverError as error:
            units.append(error)
            continue
        partner = next((u for u in units if isinstance(u, list) and _fits(u, found)), None)
        if partner is None:
            units.append([found])
        else:
            partner.append(found)
    return units


@dataclass(frozen=True)
class Rows:
    """A data set of any columns: its path as given, and the files that hold its rows."""

    path: Path
    files: list[Path]


def _rows(path: Path, options: IngestOptions) -> list[SourceFile] | Rows:
    """A data set; JSON lines may also be one of the kinds that lever knows by their content."""
    files = data_files(path, options.split)
    sources = [Source.open(file) for file in files]
    if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        with suppress(LeverError):
            found = detect(sources[0])
            asks = next(iter(rows_of(path)), {}).keys() & {"question", "input"}
            if not (options.columns.model_fields_set or asks):
                return [found]
    return Rows(path, files)


def _ingest_rows(rows: Rows, store: Store, options: IngestOptions) -> IngestResult:
    meaning = meaning_of(rows.files, options.columns)
    task = guessed_task(meaning, options.task)
    shown = meaning.shown()
    said = ", ".join(f"{name} = {column}" for name, column in shown.items())
    options.notice(f"{rows.path}: {said}; task {task.name}, scored by {task.metric}")
    if meaning.whole:
        options.notice(f"{rows.path}: {meaning.answers} holds integers as 1.0: read as 1")
    sources = [Source.open(file) for file in rows.files]
    digests = [source.sha256() for source in sources]
    options = options.but(task=task)
    first = SourceFile(sources[0], "items")
    spec = RunSpec(
        kind="examples",
        dataset=_assume(options, options.dataset, "dataset", _UNNAMED, first),
        split=_assume(options, options.split, "split", "train", first),
        source={"path": str(rows.path), "bytes": sum(s.size for s in sources)},
        source_sha256=_joint(digests),
        parameters={"columns": shown, **further_parameters(options)},
    )
    if (known := store.find(spec)) is not None:
        return IngestResult(known, is_new=False)

    def put() -> None:
        keep_pictures(rows.files, meaning, store.path)
        for source in sources:
            source.check_unchanged()

    with spill_folder() as folder:
        items = read_dataset(rows.files, meaning, folder)
        return IngestResult(*commit_examples(store, spec, (items, None), options, put))


def _fits(unit: list[SourceFile], found: SourceFile) -> bool:
    """Whether a file completes a unit: questions with annotations, not of different splits."""
    if len(unit) != 1 or {unit[0].kind, found.kind} != {"questions", "annotations"}:
        return False
    return None in (unit[0].subtype, found.subtype) or unit[0].subtype == found.subtype


def _ingest_legacy(found: SourceFile, store: Store, options: IngestOptions) -> IngestResult:
    spec = RunSpec(
        kind=found.kind,
        dataset=_assume(options, options.dataset, "dataset", _UNNAMED, found),
        split=_assume(options, options.split, "split", "train", found),
        source=_describe(found.source),
        parameters={"salvage": True} if options.salvage else {},
    )
    known = _find_early(store, spec, found.source)
    if known is not None:
        return IngestResult(known, is_new=False)
    return IngestResult(*ingest_legacy(found.source, store, spec, options.progress, options.notice))


def _find_early(store: Store, spec: RunSpec, source: Source) -> Run | None:
    """The run already there; the file is hashed first only where one of its size was ingested."""
    known = store.inventory().runs  # a damaged run does not keep other files out
    sizes = {run.source.get("bytes") for run in known if run.kind == spec.kind}
    if source.size not in sizes:
        return None
    return store.find(replace(spec, source_sha256=source.sha256()))


def _ingest_examples(unit: list[SourceFile], store: Store, options: IngestOptions) -> IngestResult:
    by_kind = {found.kind: found.source for found in unit}
    kinds = [kind for kind in ("questions", "annotations", "items") if kind in by_kind]
    sources = [by_kind[kind] for kind in kinds]
    digests = [source.sha256() for source in sources]
    subtype = next((found.subtype for found in unit if found.subtype), None)
    spec = RunSpec(
        kind="examples",
        dataset=_assume(options, options.dataset, "dataset", _UNNAMED, unit[0]),
        split=options.split or split_of(subtype),
        source={
            "path": ", ".join(_describe(s)["path"] for s in sources),
            "bytes": sum(s.size for s in sources),
        },
        source_sha256=_joint(digests),
        parameters={"files": kinds, **further_parameters(options)},
    )
    if spec.split is not None and (known := store.find(spec)) is not None:
        return IngestResult(known, is_new=False)
    annotations = None
    if "annotations" in by_kind:
        source = by_kind["annotations"]
        annotations = read_annotations(source, options.progress, salvage=options.salvage)
    if asked := by_kind.get("questions", by_kind.get("items")):
        questions = read_questions(asked, options.progress, salvage=options.salvage)
        return IngestResult(*commit_examples(store, spec, (questions, annotations), options))
    assert annotations is not None
    split = spec.split or split_of(annotations.head.get("data_subtype"))
    questions, parent = stored_questions(store, str(spec.dataset), split, sources[0])
    # they are numbered as the questions are
    parameters = {k: v for k, v in spec.parameters.items() if k != "order"}
    parameters |= {k: v for k, v in parent.parameters.items() if k == "order"}
    spec = replace(spec, parameters=parameters, parents=(parent.run,))
    return IngestResult(*commit_examples(store, spec, (questions, annotations), options))


def _file_spec(
    found: SourceFile,
    options: IngestOptions,
    kind: str,
    parameters: dict[str, Any],
    split: str = "train",
) -> RunSpec:
    """The run that one file makes; of the ``split`` where none is named."""
    return RunSpec(
        kind=kind,
        dataset=_assume(options, options.dataset, "dataset", _UNNAMED, found),
        split=_assume(options, options.split, "split", split, found),
        source=_describe(found.source),
        source_sha256=found.source.sha256(),
        parameters=parameters,
    )


def _ingest_results(found: SourceFile, store: Store, options: IngestOptions) -> IngestResult:
    name = options.name or _stem(found.source.path)
    parameters = {"results": name, "shots": options.shots}
    spec = _file_spec(found, options, "evaluation", parameters, split="val")
    return IngestResult(*ingest_results(found.source, store, spec, options.notice))


def _ingest_texts(found: SourceFile, store: Store, options: IngestOptions) -> IngestResult:
    """A JSON list of texts, one an item in the order of its split."""
    name = options.name or _stem(found.source.path)
    spec = _file_spec(found, options, "texts", {"name": name})
    if (known := store.find(spec)) is not None:
        return IngestResult(known, is_new=False)
    with found.source.reader(options.progress) as reader:
        data = b"".join(iter(lambda: reader.read(1 << 20), b""))
    try:
        texts = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LeverError(
            f"this is not a list of texts ({error})",
            where=str(found.source.path),
            hint='["text of item 0", "text of item 1", ...]',
        ) from None
    columns = [pa.repeat(value, len(texts)) for value in (spec.dataset, spec.split, name)]
    columns += [pa.array(range(len(texts)), pa.int64()), pa.array(texts, pa.string())]
    with store.begin(spec) as writer:
        writer.write("texts", pa.Table.from_arrays(columns, schema=TEXTS))
        found.source.check_unchanged()
        return IngestResult(writer.commit({"name": name}), is_new=True)


def _ingest_vectors(found: SourceFile, store: Store, options: IngestOptions) -> IngestResult:
    from lever_data.readers.vectors import embedding_batches, read_vectors

    name = options.name or _stem(found.source.path)
    spec = _file_spec(found, options, "embeddings", {"name": name})
    if (known := store.find(spec)) is not None:
        return IngestResult(known, is_new=False)
    with found.source.unpacked() as path, store.begin(spec) as writer:
        values = read_vectors(path, found.kind)
        done = 0
        for batch in embedding_batches(
            values, str(spec.dataset), str(spec.split), name, str(found.source.path)
        ):
            writer.write("embeddings", batch)
            done += batch.num_rows
            if options.progress is not None:
                options.progress(found.source.size * done // len(values), found.source.size)
        found.source.check_unchanged()
        details = {"name": name, "width": int(values.shape[1]), "dtype": str(values.dtype)}
        return IngestResult(writer.commit(details), is_new=True)


def _require_dataset(options: IngestOptions, store: Store) -> None:
    """Ask for the name where the store already has some: another is not to come by silence."""
    if options.dataset is None:
        runs = store.inventory().runs
        there = sorted({run.dataset for run in runs if run.dataset not in (None, _UNNAMED)})
        if there:
            raise UsageError(
                "the data set is not named", value=", ".join(there), hint="--dataset NAME"
            )


def _assume(
    options: IngestOptions, given: str | None, what: str, default: str, found: SourceFile
) -> str:
    """What the user gave, else the default, which is said aloud."""
    if given is not None:
        if not given.strip():
            raise UsageError(f"--{what} is empty")
        return given
    options.notice(f"{found.source.path}: no --{what} given: assuming {default}")
    return default


def _describe(source: Source) -> dict[str, Any]:
    path = str(source.path).encode("utf-8", "backslashreplace").decode()
    return {"path": path, "bytes": source.size}


def _joint(digests: list[str]) -> str:
    """The sha256 of one file, or that of the sha256 of several."""
    whole = hashlib.sha256("".join(digests).encode())
    return digests[0] if len(digests) == 1 else whole.hexdigest()


def _stem(path: Path) -> str:
    """File name without its endings: ``x.pt`` → ``x``."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    for ending in (".pt", ".pth", ".npy", ".safetensors", ".json", ".jsonl", ".zip"):
        name = name.removesuffix(ending)
    return name
