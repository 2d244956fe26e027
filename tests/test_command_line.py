"""The command line as a whole: help, exit codes, interrupts, consoles, tables, completion."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lever_cli import common
from lever_cli.app import command_line
from typer.main import get_command

import lever_data
from lever_data.options import options
from lever_train.options.train import TrainConfig
from tests.cases import long
from tests.commands import lever
from tests.stores import candidate, commit, new_store

# what is written otherwise on the command line than in a file, for the legacy trainer's sake
OTHER_FLAGS = {
    "reward.mode": "--reward-mode",
    "reward.expression": "--reward",
    "model.hidden": "--hidden-dim",
    "grpo.kl_beta_init": "--kl-beta",
    "grpo.freeze_backbone": "--freeze-backbone-in-grpo",
}


def _commands() -> Iterator[tuple[list[str], Any]]:
    root: Any = get_command(command_line())
    yield [], root
    for name, command in root.commands.items():
        yield [name], command
        for inner, further in getattr(command, "commands", {}).items():
            yield [name, inner], further


COMMANDS = list(_commands())


def test_it_says_its_version() -> None:
    assert lever("--version").stdout == f"lever {lever_data.__version__}\n"


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(w) for w, _ in COMMANDS])
def test_help_of_80_columns_cuts_nothing(
    words: list[str], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = lever(*words, "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [parameter.metavar or parameter.name.upper()]
        for name in names:
            assert re.search(rf"(?<!\S){re.escape(name)}(?!\w)", text), name
        for choice in getattr(parameter.type, "choices", ()):
            assert re.search(rf"[<|\s]{re.escape(choice)}[|>,.]", text), choice
        assert parameter.help, parameter.name
        panel = getattr(parameter, "rich_help_panel", None)
        assert panel is None or f"{panel}:" in lines
        if parameter.required:
            assert "[required]" in text
        if parameter.multiple:
            said = "Repeatable." in parameter.help or parameter.metavar == "N,N"
            assert said, parameter.name


@pytest.mark.slow
def test_everyday_options_come_first() -> None:
    for words, _ in COMMANDS[1:]:
        titles = re.findall(r"^(\w.*):$", lever(*words, "--help").stdout, re.MULTILINE)
        rest = [title.startswith("More") for title in titles]
        assert rest == sorted(rest), words


@pytest.mark.parametrize("name", ["--json", "--limit", "--seed", "--device", "--dataset", "--run"])
def test_an_option_means_the_same_in_every_command(name: str) -> None:
    other = (["run"], ["export"], ["rescore"])  # beats a file, or of one run
    found = {
        (type(p.type).__name__, p.multiple, p.metavar, p.help)
        for words, command in COMMANDS
        for p in command.params
        if name in p.opts and words not in other
    }
    assert len(found) == 1, found


def test_a_flag_is_the_key_of_the_file() -> None:
    for item in options(TrainConfig):
        section, name = item.keys
        plain = name.replace("_", "-")
        flags = (f"--{plain}", f"--{section}-{plain}", f"--{plain}/--no-{plain}")
        told = item.flag.split("/")[0]
        assert item.flag in flags or told in flags or told == OTHER_FLAGS.get(item.dotted)


def test_exit_codes_are_told() -> None:
    text = lever("--help").stdout
    assert all(re.search(rf"\b{code} +\w", text) for code in (0, 1, 2, 130))


@pytest.mark.parametrize(
    ("typed", "cursor", "found"),
    [("lever tr", 1, "train"), ("lever train --rce-ep", 2, "--rce-epochs"), ("lever ", 1, "query")],
)
def test_the_shell_completes(
    monkeypatch: pytest.MonkeyPatch, typed: str, cursor: int, found: str
) -> None:
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(cursor))
    monkeypatch.setenv("_LEVER_COMPLETE", "complete_bash")
    assert found in lever().stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [long("ascii"), "cp1252"])
@pytest.mark.parametrize("words", [["train", "--help"], ["runs", "--help"], ["views"]])
def test_a_console_of_few_characters_shows_help_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, words: list[str]
) -> None:
    store = new_store(tmp_path)
    views = store.path / "views"
    views.mkdir(exist_ok=True)
    (views / "mine.sql").write_text("-- τ 数据 🙂\n-- grain: one row per … \nselect 1 as a\n")
    if words == ["views"]:
        words = ["views", "--store", str(store.path)]
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    from lever_cli.app import run

    with pytest.raises(SystemExit) as left:
        run(words)
    console.flush()
    assert left.value.code == 0 and written.getvalue()


def _as_it_is() -> None:
    signal.raise_signal(signal.SIGINT)


def _renamed() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("the query was interrupted") from None


@pytest.mark.parametrize("act", [_as_it_is, _renamed])
def test_an_interrupt_is_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]
) -> None:
    """DuckDB and polars tell an interrupt in their own words; it is one all the same."""
    monkeypatch.setattr("lever_data.report.views.list_views", lambda *_, **__: act())
    done = lever("views", "--store", "x", check=False)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith("Error: interrupted\nHint: ")
    assert done.stderr.count("\n") == 2


def test_an_interrupt_while_a_module_is_imported(tmp_path: Path) -> None:
    """At any depth: the command's own module, or torch, whose native code knows no exception."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lever_cli.interrupts import interrupts;"
        "interrupts.is_process = True; interrupts.watch(); import slow"
    )
    text = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n"
    )
    (tmp_path / "slow.py").write_text(f"{text}    print('it went on')\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Error: interrupted\n")


@pytest.mark.slow
def test_an_interrupt_inside_duckdb(tmp_path: Path) -> None:
    """The whole group of processes gets it, the child that runs the SELECT included."""
    store = new_store(tmp_path)
    sql = "select sum(a.range * b.range) from range(10000000) a, range(10000000) b"
    words = [sys.executable, "-m", "lever_cli", "query", "--store", str(store.path), sql]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, start_new_session=True, text=True, **pipes) as child:
        while not Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().strip():
            assert child.poll() is None
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err.startswith("Error: interrupted\n") and "Traceback" not in err
    _wait_until_gone(child.pid)


def _wait_until_gone(group: int) -> None:
    """Until no process of the group is left: one that an interrupt met ends by itself."""
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "code"), [long(["select 1", "--frmat", "x"], 2), (["select 1"], 1)]
)
def test_a_query_that_is_refused_leaves_no_process(words: list[str], code: int) -> None:
    """The one that was started ahead waits for a request that never comes, as for no store."""
    command = [sys.executable, "-m", "lever_cli", "query", "--store", "none", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, text=True, **pipes) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_a_table_takes_the_width_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = "rl_data-okvqa-train-92f299d1c915"
    names = ["run", *(f"column_{i}" for i in range(12)), "last"]
    row = [run, *range(12), "a text of some words that may be broken at its spaces"]
    common.emit_table(names, [row])
    whole = capsys.readouterr()
    assert all(name in whole.out for name in names) and whole.err == ""
    assert len(whole.out.splitlines()) == 2  # nothing wraps where no terminal is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    common.emit_table(names, [row])
    shown = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.out)
    assert run in plain and "last" in plain and "…" in plain
    assert "column_0" in plain and "column_6" not in plain
    assert max(map(len, plain.splitlines())) <= 80
    assert "of 14 columns do not fit in 80" in shown.err


def test_a_row_may_stand_upright(capsys: pytest.CaptureFixture[str]) -> None:
    common.emit_vertical(["a", "long_name"], [[1, None], ["x\ny", 2.5]])
    expected = "-- row 1\na          1\nlong_name  -\n-- row 2\na          x\\ny\nlong_name  2.5\n"
    assert capsys.readouterr().out == expected


def test_without_a_terminal_progress_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with common.progress_bar("train", "queries") as advance:
        for second in range(0, 100, 10):
            now[0] = float(second)
            advance(second, 1000, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"train: {s} of 1,000 queries loss 0.5" for s in (30, 60, 90)]


def test_a_bar_of_bytes_says_no_total_that_nobody_knows() -> None:
    bars = common._Bar("ingest", "B"), common._Bar("eval", "answers")
    assert [bar._said(1500) for bar in bars] == ["1.5 kB", "1,500 answers"]


def test_a_run_is_shown_without_python(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [7, 3])], parents=("a", "b"), parameters={"n": {"k": [1, 2]}})
    shown = lever("runs", "show", store.runs()[0].run, "--store", store.path).stdout
    lines = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in shown.splitlines()}
    assert (lines["parents"], lines["parameters.n.k"]) == ("a, b", "1, 2")
    assert not set("()[]{}") & set(shown)


@pytest.mark.parametrize(
    "argv",
    [
        "ingest none.json --store {here} --dataset d",
        "query --file none.sql --store {here}",
        "convert none.pt",
        "predict --checkpoint none.pt --out p.jsonl --store {here}",
        "eval --checkpoint none.pt --store {here}",
        "serve none",
        "run --config none.toml",
        "sweep none.toml",
        "runs show none --store {here}",
        "generate --store {here} --query-embeddings none.npy --system-prompt none.txt",
        "train --store {here} --query-embeddings none.npy --out new --config none.toml",
    ],
)
def test_what_is_not_there_is_a_sentence_and_no_number(
    argv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit(new_store(tmp_path), [candidate(0, 0, [7, 3])])
    done = lever(*argv.format(here=tmp_path / "store").split(), check=False)
    assert done.returncode in (1, 2) and done.stderr.startswith("Error: ")
    assert "Errno" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "argv",
    [
        "ingest s3://bucket/x.json --store {here} --dataset d --split t",
        "ingest x.json --store abfss://bucket/store --dataset d --split t",
        "audit --store ABFS://bucket/store",
        "query select --store hdfs://node/store",
        "export --store {here} --run r --out gs://bucket/o.json",
        "train --store {here} --query-embeddings s3://bucket/e.npy --out {here}/out",
        "train --store {here} --query-embeddings e.npy --out abfss://bucket/out",
        "generate --store {here} --query-embeddings e.npy --pool hdfs://node/pool.npy",
    ],
)
def test_an_address_is_no_path(argv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Path`` would make local folders of it."""
    monkeypatch.chdir(tmp_path)
    done = lever(*argv.format(here=tmp_path / "store").split(), check=False)
    assert done.returncode == 2
    assert ":// is not read or written here: copy it, or mount it" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_narrow_list_of_runs_keeps_what_the_ids_do_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lever_cli.app import run

    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [7, 3])], name="a" * 24)
    (made,) = store.runs()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(["runs", "--store", str(store.path)])
    shown = capsys.readouterr().out
    assert all(word in shown for word in (made.run, "rows", f"{made.committed_at[:16]}Z"))
