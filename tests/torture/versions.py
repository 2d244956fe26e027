"""The tests under other versions of what lever stands on.

    python -m tests.torture.versions duckdb-1 | lowest | newest [--pytest "WORDS"]

``duckdb-1``: this environment, but the newest DuckDB 1. ``lowest``: an environment with the
smallest version that pyproject.toml allows of every dependency. ``newest``: one with the newest of
everything. torch is taken from this environment unless ``--torch`` installs it too (it is large).
Environments stay in build/versions/ and are used again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"
RUN = "-n auto -m 'not long' --ignore tests/torture"


def requirements() -> list[str]:
    """The dependencies of pyproject.toml; pytest and its like come from this environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found: list[str] = project["dependencies"]
    return found


def lowest(requirement: str) -> str:
    """``name>=1.2,<3`` → ``name==1.2``."""
    match = re.search(r">=([\d.]+)", requirement)
    if match is None:
        raise AssertionError(f"{requirement} states no lower bound")
    return f"{_name(requirement)}=={match[1]}"


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def environment(which: str, *, torch: bool) -> dict[str, str]:
    """Variables under which this Python sees the other versions first."""
    target = FOLDER / which
    if which == "duckdb-1":
        wanted, flags = ["duckdb>=1.5,<2"], ["--no-deps"]
    else:
        listed = [r for r in requirements() if torch or _name(r) != "torch"]
        wanted = [lowest(r) for r in listed] if which == "lowest" else listed
        flags = []
    if not (target / ".ready").exists():
        words = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(target)]
        subprocess.run([*words, *flags, *wanted], check=True)
        (target / ".ready").touch()
    return {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=["duckdb-1", "lowest", "newest"])
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--pytest", metavar="WORDS", default=RUN, help="in place of: %(default)s")
    given = parser.parse_args()
    env = environment(given.which, torch=given.torch)
    report = (
        "import duckdb, numpy, polars, pyarrow, torch, transformers, typer\n"
        "for m in (duckdb, numpy, polars, pyarrow, torch, transformers, typer):\n"
        "    print(m.__name__, m.__version__)"
    )
    subprocess.run([sys.executable, "-c", report], env=env, check=True)
    words = [sys.executable, "-m", "pytest", "-q"]
    if given.which == "lowest":  # old versions of others warn about one another
        words += ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
        # its tiny model is made with a class that transformers has from version 5 on
        words += ["--ignore", "tests/test_answerer_transformers.py"]
    words += shlex.split(given.pytest)
    sys.exit(subprocess.run(words, env=env, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
