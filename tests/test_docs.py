"""What README and docs say can be run: the tour runs, and every command and flag exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from lever_cli.__main__ import command_line
from lever_cli.docs import render
from lever_cli.docs_pipeline import meaning, render_pipeline
from pydantic import BaseModel
from typer.main import get_command

from lever_data.demo.files import write_world
from lever_data.demo.world import WorldSpec, make_world
from lever_train.pipeline.config import PipelineConfig
from lever_train.sweep.config import SweepConfig
from tests.commands import lever

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
# history (lab.md) may name what no longer is; cli.md is compared as a whole
CHECKED = [page for page in PAGES if page not in ("docs/lab.md", "docs/cli.md")]
_INLINE = re.compile(r"`(lever [^`]+)`")
# words of docs that stand for what the reader puts there
_STANDS_FOR = re.compile(r"…|\.\.\.")


def _commands(page: str) -> list[str]:
    """Every ``lever …`` of a page: lines of its code blocks, and inline code."""
    text = (ROOT / page).read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    lever ")]
    return lines + [found.replace("\n", " ") for found in _INLINE.findall(text)]


def _known() -> dict[str, Any]:
    root: Any = get_command(command_line())
    return dict(root.commands)


def _problem(command: str) -> str | None:
    """What of a command does not exist."""
    words = shlex.split(_STANDS_FOR.sub("", command).split("#")[0])[1:]
    if not words or words[0].startswith("-"):
        return None
    found = _known().get(words[0])
    if found is None:
        return f"there is no command {words[0]}"
    inner = getattr(found, "commands", {}).get(words[1]) if len(words) > 1 else None
    commands = [found] if inner is None else [found, inner]
    flags = {name for c in commands for p in c.params for name in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("--") and word.split("=")[0] not in flags | {"--help"}:
            return f"{words[0]} has no {word}"
    return None


@pytest.mark.parametrize("page", CHECKED)
def test_every_command_and_flag_exists(page: str) -> None:
    problems = {command: why for command in _commands(page) if (why := _problem(command))}
    assert problems == {}


def test_the_check_finds_what_is_wrong() -> None:
    assert _problem("lever fly --high") == "there is no command fly"
    assert _problem("lever train --batch 3 …") == "train has no --batch"
    assert _problem("lever runs show RUN --store S") is None


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_straight_line_is_where_it_says() -> None:
    """Every arrow of README's table: its file is there and defines the names beside it."""
    rows = re.findall(r"^\| .+→.+ \| (.+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 6
    for files, names in rows:
        source = (ROOT / re.findall(r"`([^`*]+)`", files)[0]).read_text()
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"^ *def {name}\(", source, re.M), f"{files} has no {name}"


def test_the_list_of_commands_is_up_to_date() -> None:
    pinned = re.search(r"^typer==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or pinned.group(1) != typer.__version__:
        pytest.skip(f"written for the pinned typer; this is {typer.__version__}")
    assert (ROOT / "docs" / "cli.md").read_text() == render(), (
        "run: python -m lever_cli.docs > docs/cli.md"
    )


def test_the_list_of_keys_is_up_to_date() -> None:
    assert (ROOT / "docs" / "pipeline.md").read_text() == render_pipeline(), (
        "run: python -m lever_cli.docs pipeline > docs/pipeline.md"
    )


def test_every_key_says_what_it_means() -> None:
    tables: dict[str, type[BaseModel]] = {"sweep": SweepConfig, **_tables(PipelineConfig)}
    keys = {f"{t}.{k}": f for t, model in tables.items() for k, f in model.model_fields.items()}
    assert len(keys) > 100
    assert [key for key, field in keys.items() if not meaning(key, field)] == []


def _tables(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    """The models of all TOML tables that hold values, by dotted name."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        nested = any(isinstance(f.default, BaseModel) for f in inner.model_fields.values())
        found |= _tables(inner, f"{prefix}{name}.") if nested else {f"{prefix}{name}": inner}
    return found


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section of README, line by line, on a small world under the names it uses."""
    files = write_world(make_world(WorldSpec(160, 50, 10)), tmp_path / "world")
    names = {
        "rl_data.json": files.rl_data,
        "questions.json": files.questions("train"),
        "annotations.json": files.annotations("train"),
        "val_questions.json": files.questions("val"),
        "val_annotations.json": files.annotations("val"),
        "val_pool.npy": files.pool("val"),
    }
    for name, source in names.items():
        (tmp_path / name).write_bytes(source.read_bytes())
    for name, split in (("queries.pt", "train"), ("val_queries.pt", "val")):
        torch.save(torch.from_numpy(np.load(files.embeddings(split))), tmp_path / name)
    (tmp_path / "lever.toml").write_text(
        '[data]\ndataset = "okvqa"\nrl_data = ["rl_data.json"]\n'
        'questions = "questions.json"\nannotations = "annotations.json"\n'
        'eval_questions = "val_questions.json"\neval_annotations = "val_annotations.json"\n'
        'query_embeddings = "queries.pt"\neval_embeddings = "val_queries.pt"\n'
        'eval_pool = "val_pool.npy"\n[sft]\nenabled = false\n'
        "[train.rce]\nepochs = 1\n[train.run]\nbatch_size = 64\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEVER_STORE", raising=False)
    text = (ROOT / "README.md").read_text()
    section = text.split("## Five minutes with your own data")[1].split("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    lever ")]
    assert len(lines) >= 10
    for line in lines:
        lever(*shlex.split(line)[1:])
    for made in ("audit.html", "checkpoints/best.pt", "eval.json", "picks.jsonl", "lever-out"):
        assert (tmp_path / made).exists(), made
