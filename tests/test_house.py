"""The plan of the house: which folder may import which, and what each says of itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Every folder, and the folders it may import; what those may import, it may too.
MAY_IMPORT = {
    "lever_data": (),
    "lever_data.store": ("lever_data",),
    "lever_data.readers": ("lever_data.store",),
    "lever_data.relations": ("lever_data.store",),
    "lever_data.items": ("lever_data.relations",),
    "lever_data.sources": ("lever_data.readers", "lever_data.items"),
    "lever_data.report": ("lever_data.sources",),
    "lever_train": ("lever_data.report",),
    "lever_train.options": ("lever_train",),
    "lever_train.inputs": ("lever_train.options",),
    "lever_train.selector": ("lever_train.inputs",),
    "lever_train.learn": ("lever_train.selector",),
    "lever_train.rollout": ("lever_train.selector",),
    "lever_train.rollout.answerers": ("lever_train.inputs",),
    "lever_train.embed": ("lever_train.inputs",),
    "lever_train.evaluate": ("lever_train.rollout", "lever_train.learn"),
    "lever_train.pack": ("lever_train.evaluate", "lever_train.embed"),
    "lever_train.flow": ("lever_train.learn", "lever_train.embed", "lever_train.evaluate"),
    "lever_demo": ("lever_train.flow",),
    "lever_board": ("lever_train.flow",),
    "cli": ("lever_demo", "lever_board", "lever_train.pack"),
    "lever": ("lever_train.flow", "lever_train.pack"),
}
DOORS = [ROOT / top / "__init__.py" for top in ("lever_data", "lever_train")]  # no rooms
INSIDE = {"lever_train.rollout": ("lever_train.rollout.answerers",)}


def _allowed(folder: str) -> set[str]:
    found = {folder, *INSIDE.get(folder, ())}
    for below in MAY_IMPORT[folder]:
        found |= _allowed(below)
    return found


def _folder_of(module: str) -> str:
    parts = module.split(".")
    while ".".join(parts) not in MAY_IMPORT:
        parts.pop()
    return ".".join(parts)


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_of_code_has_its_place() -> None:
    tops = ("lever_data", "lever_train", "lever_demo", "lever_board", "cli", "lever")
    found = {
        ".".join(f.parent.relative_to(ROOT).parts) for t in tops for f in (ROOT / t).rglob("*.py")
    }
    assert found == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    allowed = _allowed(folder)
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / folder.replace(".", "/")).glob("*.py"))
        if file not in DOORS
        for name in _imports(file)
        if name.split(".")[0] in MAY_IMPORT and _folder_of(name) not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_folder_says_what_lives_there(folder: str) -> None:
    tree = ast.parse((ROOT / folder.replace(".", "/") / "__init__.py").read_text())
    assert ast.get_docstring(tree)
