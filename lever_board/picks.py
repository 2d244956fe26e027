"""What each checkpoint of the store's trainings picks for a query, as `lever predict` picks it.

In goes a page; out come the checkpoints that can be found, and the picks of each once a process of
its own has made them. Vectors and pools are those of the training's record or, for queries of
another split, of an evaluation there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lever_board.page import PageRequest
from lever_board.store_pages import bytes_text, short_name, size
from lever_data.store.files import sha256_file
from lever_data.store.store import Run
from lever_train.options.evaluate import Contest, EvalRequest, Questions

TRAININGS = 6  # the newest ones, whose best checkpoints are asked
SHOTS = 4  # as `lever predict` without --shot-num; picks at fewer shots are the first of these
BLOCK = 64  # queries that are asked for at once: the next one is there when it is wanted
HEAVY = 500_000_000  # bytes of vectors that are read only when the reader says so
_PHASES = ("sft", "rce", "grpo", "dense")


@dataclass(frozen=True)
class Pick:
    """A checkpoint's ordered demonstrations for the query, or why there are none."""

    training: str
    checkpoint: str
    pointer: tuple[int, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True)
class Picks:
    """What is known by now. ``is_waiting``: a process makes them at this moment; ``size``: of the
    vectors, where they are so large that the reader is to ask; ``older``: trainings left out."""

    found: tuple[Pick, ...] = ()
    is_waiting: bool = False
    size: str | None = None
    older: int = 0


def picks_of(asked: PageRequest, place: tuple[str, str], query_id: int) -> Picks:
    """The picks of every training's best checkpoint, or of all checkpoints of the training that
    the parameter ``training`` names."""
    trainings = [run for run in asked.state.kind("training") if run.dataset == place[0]]
    if name := asked.text("training"):
        trainings = [run for run in trainings if run.run == name]
    picks: list[Pick] = []
    wanted: list[dict[str, Any]] = []  # what a process is asked, of each pick that has no reason
    for run in trainings[:TRAININGS]:
        folder = _path(asked, str(run.source.get("path", "")))
        files = checkpoints(folder, is_all=bool(name))
        inputs = _inputs(asked, run, folder, place)
        if not files:
            picks.append(Pick(short_name(run), "–", why_not=f"no checkpoint lies in {folder}"))
        for file in files:
            pick = Pick(short_name(run), file.resolve().name)
            if inputs is None:
                where = "/".join(place)
                why = f"no vectors of {where} are on record: `lever eval` on {where} names them"
                picks.append(replace(pick, why_not=why))
            else:
                picks.append(pick)
                wanted.append(_wanted(asked, run, file, inputs, place, query_id))
    older = max(len(trainings) - TRAININGS, 0)
    heavy = sum({path: count for one in wanted for path, count, _ in one["vectors"]}.values())
    if heavy > HEAVY and asked.text("picks") != "1":
        return Picks(size=bytes_text(heavy), older=older)
    if wanted:
        words = json.dumps(wanted)
        made = asked.board.picks(asked.state, words, is_patient=not asked.links.is_live)
        if made is None:
            return Picks(is_waiting=True, older=older)
        answers = iter(made)
        picks = [p if p.why_not else _answered(p, next(answers), query_id) for p in picks]
    return Picks(tuple(picks), older=older)


def checkpoints(folder: Path, *, is_all: bool) -> list[Path]:
    """The checkpoints of a training's folder: the best, else the last; or every epoch's."""
    if not is_all:
        return [path for n in ("best.pt", "last.pt") if (path := folder / n).is_file()][:1]
    found = [
        (order, int(number), path)
        for order, phase in enumerate(_PHASES)
        for path in folder.glob(f"{phase}_epoch*.pt")
        if (number := path.stem.removeprefix(f"{phase}_epoch")).isdigit()
    ]
    return [path for _, _, path in sorted(found)]


def _inputs(
    asked: PageRequest, run: Run, folder: Path, place: tuple[str, str]
) -> dict[str, str | None] | None:
    """Vectors, pool and the demonstrations' split: of the training where it is of this place, else
    of an evaluation there, of this training's checkpoints if there is one; ``None`` without."""
    data = run.parameters.get("data", {})
    if run.split == place[1] and data.get("query_embeddings"):
        names = ("query_embeddings", "candidate_embeddings", "pool")
        own = "train" if data["candidate_embeddings"] else place[1]  # as `lever generate` has it
        return {**{name: data[name] for name in names}, "candidate_split": own}
    made = [r for r in asked.state.kind("evaluation") if (r.dataset, r.split) == place]
    made = [r for r in made if r.details.get("inputs")]
    made.sort(key=lambda r: str(folder) not in str(r.source.get("path")))
    return _inputs_of(asked, made[0]) if made else None


def _inputs_of(asked: PageRequest, evaluation: Run) -> dict[str, str | None]:
    """The same of an evaluation. Its record names the files, and of vectors in the store those of
    their run."""
    runs = {run.run: run for run in asked.state.runs}
    named: dict[str, dict[str, None]] = {}
    for one in evaluation.details["inputs"]:
        run = runs.get(one["path"].partition("/")[0])
        stored = run and (run.details.get("name") or run.parameters.get("name"))
        named.setdefault(one["role"], {})[stored or one["path"]] = None
    parts = {role: ",".join(paths) for role, paths in named.items()}
    splits = [runs[p].split for p in evaluation.parents if p in runs and runs[p].kind == "examples"]
    return {
        "query_embeddings": parts.get("query embeddings"),
        "candidate_embeddings": parts.get("candidate embeddings"),
        "pool": parts.get("pool"),
        "candidate_split": next((s for s in splits if s != evaluation.split), evaluation.split),
    }


def _wanted(
    asked: PageRequest,
    run: Run,
    file: Path,
    inputs: Mapping[str, str | None],
    place: tuple[str, str],
    query_id: int,
) -> dict[str, Any]:
    """What the process is asked about a checkpoint. The content of the checkpoint and the state of
    the files stand in it, so that what changed is asked anew."""
    named = {
        name: ",".join(str(_path(asked, part.strip())) for part in value.split(","))
        for name, value in inputs.items()
        if value is not None
    }
    first = query_id - query_id % BLOCK
    request = EvalRequest(
        store=asked.board.store.path.resolve(),
        checkpoints=(file,),
        runs=asked.state.names,
        questions=Questions.model_validate({"dataset": place[0], "split": place[1], **named}),
        contest=Contest(shots=(SHOTS,)),
        query_ids=tuple(range(first, first + BLOCK)),
    )
    vectors = {named[n] for n in ("query_embeddings", "candidate_embeddings") if n in named}
    return {
        "request": request.model_dump(mode="json"),
        "training": run.run,
        "sha256": sha256_file(file),
        "vectors": [_state_of(asked, part) for v in sorted(vectors) for part in v.split(",")],
    }


def _path(asked: PageRequest, text: str) -> Path:
    """A path of a record: as it is written, else beside the store, for records hold relative ones.
    A name in the store stays as it is."""
    beside = asked.board.store.path.resolve().parent / text
    return beside if not Path(text).exists() and beside.exists() else Path(text)


def _state_of(asked: PageRequest, path: str) -> tuple[str, int, int]:
    """A file of vectors, its bytes and when it changed; of a name in the store, the bytes of all
    its runs, which never change."""
    if Path(path).is_file():
        stat = Path(path).stat()
        return path, stat.st_size, stat.st_mtime_ns
    return path, sum(size(run) for run in asked.state.kind("embeddings")), 0


def _answered(pick: Pick, answer: Mapping[str, Any], query_id: int) -> Pick:
    if why := answer.get("why_not"):
        return replace(pick, why_not=why)
    pointer = answer["pointers"].get(str(query_id))
    if pointer is None:
        return replace(pick, why_not="the split has no such question")
    return replace(pick, pointer=tuple(pointer))
