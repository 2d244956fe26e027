"""What makes two rollouts the same run: everything their rows depend on, by content.

In go a resolved job; out comes the :class:`RunSpec` whose hash names the run and its shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from lever_data.files import sha256_file
from lever_data.store import RunSpec
from lever_data.vqa_metric import METRIC_VERSION
from lever_train.pools import SharedPool
from lever_train.rollout.answerers.base import canonical
from lever_train.rollout.job import Job
from lever_train.rollout.proposals import PROPOSAL_VERSION


def run_spec(job: Job, parents: tuple[str, ...]) -> RunSpec:
    """The identity of the run a job will make."""
    request = job.request
    parameters: dict[str, Any] = {
        "versions": {"proposals": PROPOSAL_VERSION, "metric": METRIC_VERSION},
        "scorer": job.label.scorer,
        "policy": job.label.policy,
        "generation": job.label.generation,
        "shots": sorted(set(request.shots)),
        "allow_fallback": request.allow_fallback,
        "queries": len(job.query_ids),
        "content": _digest(job),
    }
    if job.given is None:
        parameters["recipe"] = asdict(job.recipe)
    if request.which.target_view is not None:  # a budget is shared out by shard
        parameters |= {"budget": request.budget, "shard_size": request.shard_size}
    source = {"view": request.which.from_view or request.which.target_view or request.which.queries}
    return RunSpec(
        kind=job.spec.kind,
        dataset=job.label.dataset,
        split=job.label.split,
        source={k: v for k, v in source.items() if v is not None},
        source_sha256=_digest(job),
        parameters=parameters,
        parents=parents,
    )


def _digest(job: Job) -> str:
    """sha256 of the data a job reads: queries, ground truth, examples, vectors, pool, pointers."""
    digest = hashlib.sha256(job.query_ids.tobytes())
    for number, item in job.items.items():
        truth = job.truths[number]
        digest.update(canonical([item.question_id, item.question, truth.answers, truth.official]))
    if not job.own:
        for number, item in job.examples.items():
            digest.update(canonical([number, item.question, item.answer, item.answers]))
    for vectors in (job.query_vectors, None if job.own else job.example_vectors):
        if vectors is not None:
            digest.update(vectors.numpy().tobytes())
    if isinstance(job.pool, SharedPool):
        digest.update(job.pool.ids.tobytes())
    elif job.pool is not None:
        digest.update(job.pool.of(job.query_ids).tobytes())
    if job.given is not None:
        digest.update(job.given.row.tobytes() + job.given.pointer.tobytes())
    if job.known is not None:
        stored = sorted((q, sorted(p)) for q, p in job.known.pointers.items())
        digest.update(repr(stored).encode())
    if job.request.inputs.checkpoint is not None:
        digest.update(sha256_file(job.request.inputs.checkpoint).encode())
    return digest.hexdigest()
