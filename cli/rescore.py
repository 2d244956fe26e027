"""``lever rescore``: official scores from the stored answers, without calling any model."""

from __future__ import annotations

from lever_data.report.options import RescoreRequest
from lever_data.vocabulary import DEFAULT_STORE, JsonFile, StorePath

from .common import emit, emit_table, notice
from .flags import with_flags

_SHOWN = 20


@with_flags
def rescore(
    request: RescoreRequest, store: StorePath = DEFAULT_STORE, json: JsonFile = None
) -> None:
    """Score stored answers anew, as a new run.

    By the metric of the task, for VQA the official accuracy. No model is called. Every row with an
    answer becomes an official row; those whose score changes are listed with how they were scored
    before.
    """
    from dataclasses import asdict

    from lever_data.items.vqa_metric import few_annotators
    from lever_data.report.rescore import rescore
    from lever_data.store.store import Store

    done = rescore(Store.open(store), request)
    changes = [asdict(change) for change in done.changes]
    if emit({**asdict(done), "run": done.run.run, "changes": changes}, json):
        return
    notice(f"{'rescored as' if done.is_new else 'already rescored as'} {done.run.run}")
    counts = {
        "rows": done.num_rows,
        "fallback before": done.num_fallback_before,
        "of unknown mode before": done.num_unknown_before,
        "score changed": len(done.changes),
        "without annotation, left as they were": done.num_missing,
        "without answer, left as they were": done.num_unanswered,
        "a prefix without answer, left as they were": done.num_partial,
        "without text to read anew, left as they were": done.num_unread,
        "failed in scoring, now scored": done.num_healed,
    }
    emit_table(["rescore", "rows"], counts.items())
    if done.num_few:
        notice(few_annotators(done.num_few, done.num_rows, "rows"))
    if done.changes:
        print()
        emit_table(
            ["query", "candidate", "answer", "scored by", "before", "official"],
            [
                [c.query_id, c.candidate, c.prediction, c.old_mode, c.old, c.new]
                for c in done.changes[:_SHOWN]
            ],
        )
    if len(done.changes) > _SHOWN:
        notice(f"{len(done.changes) - _SHOWN} more: --json lists them all")
