"""Questions and answers become a run of examples: how they are numbered, what is refused, and what
the reader of a figure is told of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lever_data.errors import UsageError
from lever_data.items.vqa_metric import few_annotators
from lever_data.readers.source import Source
from lever_data.sources.belong import require_known_queries
from lever_data.sources.ingest_options import IngestOptions
from lever_data.sources.item_file import (
    ItemFile,
    annotator_counts,
    example_batches,
    is_sorted,
    place_of,
    split_of,
    stored_items,
)
from lever_data.store.integrity import require_intact
from lever_data.store.store import Run, RunSpec, Store


def commit_examples(
    store: Store,
    spec: RunSpec,
    files: tuple[ItemFile, ItemFile | None],
    options: IngestOptions,
    put_more: Callable[[], None] = lambda: None,
) -> tuple[Run, bool]:
    """Commit questions and their annotations as a run of examples; the run, and whether it is new.

    ``spec.split`` ``None``: the one that the questions name. ``put_more`` puts
    what is beside the run; it is called when nothing else can be refused.

    Raises:
        LeverError: the questions do not fit what the store holds, or a file changed meanwhile.
    """
    questions, annotations = files
    split = spec.split or split_of(questions.head.get("data_subtype"))
    if split is None:
        split = "train"
        options.notice(f"{questions.source.path}: no --split given: assuming train")
    elif options.split is None:
        options.notice(f"{questions.source.path}: no --split given: it says {split}")
    spec = replace(spec, split=split)
    if (known := store.find(spec)) is not None:
        return known, False
    numbers = place_of(questions, options.order if not spec.parents else "file")
    place = (str(spec.dataset), split)
    require_known_queries(store, place, numbers, questions, annotations)
    counts = annotator_counts(questions, annotations)
    if counts[0] == questions.num_rows:
        _require_no_answers(store, place, questions)
    _tell_examples(
        files, counts, options, is_ordered=bool(spec.parents) or "columns" in spec.parameters
    )
    details = {
        "data_subtype": questions.head.get("data_subtype"),
        "data_type": questions.head.get("data_type"),
        "order": spec.parameters.get("order", "file"),
        "unanswered": counts[0],
        "few_annotators": sum(counts[1:4]),
        "skipped": [why for file in files if file is not None for _, why in file.skipped],
    }
    with store.begin(spec) as writer:
        for table in example_batches(questions, annotations, place, numbers, options.image_name):
            writer.write("examples", table)
        for item in files:
            if item is not None:
                item.source.check_unchanged()
        put_more()
        return writer.commit(details), True


def _require_no_answers(store: Store, place: tuple[str, str], questions: ItemFile) -> None:
    """Refuse questions without answers where the store holds their split with answers: the newest
    questions of a split count, so those answers would be hidden."""
    for run in reversed(store.inventory().runs):
        same = run.kind == "examples" and (run.dataset, run.split) == place
        if same and run.details.get("unanswered", 0) < run.num_rows:
            raise UsageError(
                "these questions have no answers, and would hide those of a run in the store",
                where=str(questions.source.path),
                value=run.run,
                hint="name the annotations in the same command, or remove that run first",
            )


def _tell_examples(
    files: tuple[ItemFile, ItemFile | None],
    counts: list[int],
    options: IngestOptions,
    *,
    is_ordered: bool,
) -> None:
    """Say what the reader of a figure should know of these questions."""
    where, total = files[0].source.path, files[0].num_rows
    for file in files:
        for _, why in () if file is None else file.skipped:
            options.notice(f"left out: {why}")
    if counts[0] == total:
        options.notice(f"{where}: no annotations given: answers null")
    elif counts[0]:
        options.notice(f"{where}: {counts[0]:,} questions have no annotation: answers null")
    is_vqa = options.task is None or options.task.metric == "vqa-accuracy"
    if is_vqa and (few := sum(counts[1:4])):
        options.notice(f"{where}: {few_annotators(few, total)}")
    if options.order == "file" and not is_ordered and not is_sorted(files[0]):
        options.notice(
            f"{where}: questions are numbered as they stand in the file; RL data, pools and "
            "vectors of the legacy code number them by question_id (--order question_id)"
        )


def stored_questions(
    store: Store, dataset: str, split: str | None, source: Source
) -> tuple[ItemFile, Run]:
    """Questions of the newest examples run of this dataset and split, for lone annotations."""
    runs = [r for r in store.runs() if (r.kind, r.dataset, r.split) == ("examples", dataset, split)]
    if not runs:
        raise UsageError(
            f"annotations alone: the store has no questions of dataset {dataset}, split {split}",
            where=str(source.path),
            hint="name the question file in the same command, before or after the annotations",
        )
    require_intact([runs[-1]])
    return stored_items(source, runs[-1]), runs[-1]


def further_parameters(options: IngestOptions) -> dict[str, Any]:
    """Parameters that stand in a run's identity where they are not the default."""
    found: dict[str, Any] = {} if options.order == "file" else {"order": options.order}
    if options.image_name is not None:
        found["image_name"] = options.image_name
    if options.task is not None and (task := options.task.stored()):
        found["task"] = task
    return found | ({"salvage": True} if options.salvage else {})
