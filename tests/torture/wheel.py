"""The wheel as a user gets it: built, installed in an empty environment, run from another folder.

    python -m tests.torture.wheel [--quick]

``--quick`` borrows the dependencies of this environment instead of installing them. The checkout
is out of reach: Python runs isolated (-I), from a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> Path:
    """Build the wheel from a copy of what git tracks, so that stray files cannot help."""
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], cwd=source, input=archive.stdout, check=True)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    subprocess.run(list(map(str, words)), check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, *, quick: bool) -> Path:
    """An empty environment with the wheel in it; returns its ``bin``."""
    made = folder / "env"
    flags = ["--without-pip"] if quick else []
    subprocess.run([sys.executable, "-m", "venv", *flags, str(made)], check=True)
    if quick:
        (packages,) = made.glob("lib/python*/site-packages")
        words = [sys.executable, "-m", "pip", "--python", str(made), "install"]
        subprocess.run([*words, "-q", "--no-deps", str(wheel)], check=True)
        (own,) = Path(sys.prefix).glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(f"{own}\n")
        return made / "bin"
    pip = [str(made / "bin" / "python"), "-m", "pip", "install", "-q"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, "torch"], check=True)
    subprocess.run([*pip, *constraints, str(wheel)], check=True)
    return made / "bin"


def use(bin_: Path, folder: Path) -> None:
    """Run the demo and a few commands, far from the checkout."""
    away = folder / "away"
    away.mkdir()

    def lever(*words: str) -> str:
        code = "from lever_cli.__main__ import main; main()"
        done = subprocess.run(
            [str(bin_ / "python"), "-I", "-c", code, *words],
            cwd=away,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"lever {' '.join(words)}: {done.stderr}"
        return done.stdout

    where = "import lever_data, lever_train, lever_cli, lever_sql as s; print(s.__file__)"
    found = subprocess.run(
        [str(bin_ / "python"), "-I", "-c", where], cwd=away, capture_output=True, text=True
    ).stdout
    assert str(bin_.parent) in found, f"not from the wheel: {found}"
    assert "ingest" in lever("--help")
    assert (bin_ / "lever").exists()
    scores = json.loads(lever("demo", "--questions", "240", "--json", "-"))
    print(f"demo from the wheel: {len(scores['rows'])} rows of its table")
    (store,) = [p.parent for p in away.rglob("lever.json")]
    assert "all_candidates" in lever("views", "--store", str(store))
    lever("check", "--store", str(store))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        print(f"built {wheel.name}, {wheel.stat().st_size:,} bytes")
        use(install(wheel, folder, quick=given.quick), folder)
    print("the wheel works")


if __name__ == "__main__":
    main()
