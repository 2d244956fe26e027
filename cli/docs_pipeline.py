"""``python -m lever_cli.docs pipeline``: the text of docs/pipeline.md.

In go the models of ``lever.toml`` and of sweep files; out comes a page with an introduction and one
table per TOML table: key, type, default, meaning. A test compares it with the file.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_HEAD = """# The pipeline

Made by `python -m lever_cli.docs pipeline > docs/pipeline.md`; do not edit. How `lever run` and
`lever sweep` work, and every key of the files they read.

## A first `lever.toml`

`lever run` does the whole job from files to a scoreboard. What it works on stands in `lever.toml`.
Paths in it are seen from the folder of the file. This one trains on RL data that is there, and
evaluates:

    # lever.toml
    [data]
    dataset = "demo"
    rl_data = ["world/rl_data_MixSampler_DemoVLM.json"]
    questions = "world/train_questions.json"
    annotations = "world/train_annotations.json"
    query_embeddings = "world/train_embeddings.npy"
    eval_questions = "world/val_questions.json"
    eval_annotations = "world/val_annotations.json"
    eval_embeddings = "world/val_embeddings.npy"
    eval_pool = "world/val_pool.npy"

    [sft]
    enabled = false

    [train.rce]
    epochs = 2

    [train.run]
    batch_size = 64

First look at the plan, then run:

    lever run --dry-run
    lever run

Where there is no RL data yet, leave `rl_data` out: `lever run` then generates it with the answerer
of `[answerer]`. `examples/okvqa_nearest.toml` is such a file.

## The steps

They come in this order. A step that is not needed is left out, and the plan says why.

1. `ingest` reads the given questions, annotations, RL data and beams into the store.
2. `embed` embeds the questions and images of both splits. Left out where `query_embeddings` are
   given.
3. `pool` finds the most similar train items of every query. Left out where `[pool] size` is not
   set, or both pools are given.
4. `beam` searches InfoScore beams, which SFT learns from. Left out where beams or an SFT checkpoint
   are given, or SFT is off.
5. `sft` trains the checkpoint RL starts from, or takes the given one where its file is there. Left
   out where `[sft] enabled` is false and no checkpoint is there: RL starts from a fresh selector.
6. `generate` makes RL data: it proposes candidates, asks the answerer, and scores the answers. Left
   out where `rl_data` is given, unless `also` is true.
7. `audit` writes `audit.html` and `audit.json`. A gate of `fail_on` stops the run here.
8. `train` does RCE, then GRPO if it has epochs.
9. `convert` writes the checkpoint in the older format, beside it.
10. `evaluate` writes `eval.json` and `eval.html`: SFT, RCE and GRPO beside the baselines. Left out
    where `eval_questions` are not given, or `query_embeddings` are given and `eval_embeddings` are
    not.

Checkpoints, pages and `pipeline.json` lie in `out`; rows lie in the store.

## What is skipped, what is redone

After each step `out/pipeline.json` notes what it depended on: its options, the contents of the
files it read, the steps before it, and the version of lever. The next `lever run` skips a step
where all of that is as it was and its outputs are still there. It does a step again where

- an option or a file changed (the plan names it, with the old and the new value),
- a step before it that it uses changed,
- one of its outputs was deleted,
- you ask for it: `lever run --force evaluate`.

A run that was killed goes on: finished steps are skipped, and the step that was cut off takes up
the work it had done. Delete `pipeline.json` to do every step again; what the store already holds is
found there and not made twice.

## A sweep

`lever sweep` trains and evaluates many variants (*cells*) of one pipeline. The steps before
training are done once, for all cells.

    # sweep.toml
    name = "light_grpo"
    base = "lever.toml"

    [train.rce]
    epochs = 1

    [[cells]]
    "grpo.epochs" = 0

    [[cells]]
    "grpo.epochs" = 1
    "grpo.reference" = "rce"

    [grid]
    "run.seed" = [0, 1]

Keys of cells and grid are the options of the `[train.…]` tables below, without `train.`, in quotes.
`[grid]` gives each option a list of values, and every combination is a cell. Each `[[cells]]` table
is one cell with the options it names. With both, every listed cell is combined with the whole grid:
here 2 × 2 = 4 cells. `[train.…]` sets options for all cells.

    lever sweep sweep.toml
    lever query "select settings, accuracy from sweeps order by accuracy desc"

Each cell stands beside the SFT model it starts from, and where there is none beside the first cell
of the file, paired by question. Of cells that differ in `run.seed` alone mean and spread are said.

`--jobs 4` trains four cells at a time. A finished cell is kept in `sweeps/<name>/`, and the same
command goes on with the cells that are missing; a cell runs anew where what it depends on changed.
`sweep.html` there shows them.

A cell is chosen by its accuracy on the training questions that were held out, so that the figure on
the eval split is not the luck of a winner. Where cells hold out different ones, or none (a `data`
option in the grid, `split_ratio = 1`), it is chosen on the eval split, and the report says so.
With `judged_on` every cell trains once for each of the views that are named, without its questions,
and is judged on them: `judged_on = ["fold_0", "fold_1"]` chooses on training questions alone and
never reads the eval split. `[eval]` says how cells are judged, as in a `lever.toml`. Two
cells that compute the same (a weight the reward mode does not read, an option of a phase without
epochs) are refused; cells that answer every question alike count as one in what luck would give.
More sweeps to start from are in `examples/`.
"""
_TRAIN = """The options of `lever train`, one table each; with `--config FILE` that command reads
the same tables, their names without `train.`. In a `lever.toml` four of them are set by the
pipeline, from `[data]` and `[sft]`: `query_embeddings`, `candidate_embeddings` and `pool` of
`[train.data]`, and `sft_checkpoint` of `[train.model]`."""

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TYPES = {str: "text", Path: "path", int: "integer", float: "number", bool: "true or false"}


def render_pipeline() -> str:
    """The Markdown of the page."""
    from lever_train.options.pipeline import PipelineConfig
    from lever_train.options.sweep import SweepConfig

    parts = [_HEAD, "## Keys of a sweep file\n", _table("sweep", SweepConfig)]
    parts.append("## Keys of `lever.toml`\n\nA key that is not listed here is an error.\n")
    for name, field in PipelineConfig.model_fields.items():
        model = _model(field)
        if name == "train":
            parts.append(f"### `[train.…]`\n\n{_TRAIN}\n")
            parts += [_section(f"train.{k}", f) for k, f in model.model_fields.items()]
        else:
            parts.append(_section(name, field))
    return "\n".join(parts)


def _model(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return field.annotation


def _section(name: str, field: FieldInfo) -> str:
    """One table of the file: its purpose, from the model's docstring, and its keys."""
    model = _model(field)
    purpose = " ".join(inspect.getdoc(model).split("\n\n")[0].split())  # type: ignore[union-attr]
    return f"### `[{name}]`\n\n{purpose.replace('``', '`')}\n\n{_table(name, model)}"


def _table(name: str, model: type[BaseModel]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if not field.description and not field.is_required():  # decided inside, no option
            continue
        cells = (f"`{key}`", kind(field), _default(field), meaning(f"{name}.{key}", field))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def meaning(name: str, field: FieldInfo) -> str:
    """What a key means: the description of its field, which every key has."""
    assert field.description, f"the key {name} has no description"
    return field.description


def kind(field: FieldInfo) -> str:
    """The type of a key in words, with its bounds."""
    bounds = [
        f"{sign} {_number(getattr(bound, name))}"
        for bound in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(bound, name)
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in inner)
    if origin is tuple:
        return "list" if inner[0] is Any else f"list of {_kind(inner[0])}s"
    if origin is dict:
        values = "" if inner[1] is Any else f" of {_kind(inner[1])}s"
        return f"table{values}"
    return _TYPES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "not set"
    plain = str(value) if isinstance(value, Path) else value
    return f"`{json.dumps(plain, ensure_ascii=False)}`"
