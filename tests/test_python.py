"""`import lever`: the door itself, views in every form, batches, and the page that shows them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

import lever
from lever_data.sources.ingest import ingest
from lever_data.sources.ingest_options import IngestOptions
from lever_data.store.store import Store
from lever_demo.files import DATASET, write_world
from lever_demo.world import WorldSpec, make_world
from lever_train.learn.batch import Loader
from lever_train.learn.data import open_data
from tests.cases import long
from tests.training import Bench

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def view(bench: Bench) -> lever.View:
    return lever.open(bench.store.path).view("beam")


@pytest.fixture(scope="module")
def config(bench: Bench) -> lever.TrainConfig:
    data = lever.DataConfig(query_embeddings=str(bench.vectors), skip_fallback=True)
    return lever.TrainConfig(data=data, run=lever.RunConfig(batch_size=4, seed=3))


def test_the_door_alone_loads_nothing_heavy() -> None:
    heavy = ("duckdb", "polars", "pyarrow", "numpy", "pydantic", "torch")
    code = f"import sys, lever; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_door_is_there() -> None:
    assert [name for name in lever.__all__ if getattr(lever, name) is None] == []
    assert dir(lever) == lever.__all__
    with pytest.raises(AttributeError, match="'lever' has no attribute 'fly'"):
        lever.fly  # noqa: B018


@pytest.mark.long
def test_a_view_is_the_same_in_every_form(bench: Bench, view: lever.View) -> None:
    with_beam = view.session.con.execute("select count(*) from beam").fetchall()[0][0]
    table = view.arrow()
    assert table.num_rows == with_beam > 0
    assert view.polars().equals(pl.DataFrame(table))
    assert view.relation().columns == table.column_names
    assert set(table["gen_method"].to_pylist()) == {"beam"}
    chosen = lever.open(str(bench.store.path)).view("beam", runs=[bench.run.run])
    assert chosen.arrow().equals(table)


def test_pandas_is_a_frame_or_one_sentence(
    view: lever.View, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = view.pandas()
    assert list(frame.columns) == view.arrow().column_names
    assert frame["query_id"].tolist() == view.arrow()["query_id"].to_pylist()
    monkeypatch.setattr("lever.views.find_spec", lambda name: None)
    with pytest.raises(lever.UsageError, match=r"^pandas is not installed$"):
        view.pandas()


def test_a_relation_joins_frames_of_the_caller(view: lever.View) -> None:
    """Each call has its own: one name may mean two frames."""
    frames = [pl.DataFrame({"query_id": ids}) for ids in ([1], [1, 2])]
    relations = [view.relation(mine=f) for f in (frames[0], frames[1].to_arrow())]
    sql = "select distinct query_id from v semi join mine using (query_id) order by all"
    found = [joined.fetchall() for r in relations if (joined := r.query("v", sql)) is not None]
    assert found == [[(1,)], [(1,), (2,)]]


def test_a_frame_that_cannot_be_joined_is_refused(view: lever.View) -> None:
    with pytest.raises(lever.UsageError, match=r"a relation of this name.*value 'queries'"):
        view.relation(queries=pl.DataFrame({"a": [1]}))
    with pytest.raises(lever.UsageError, match=r"or Arrow table; at mine; value 'int'"):
        view.relation(mine=3)


def test_a_text_where_a_list_is_meant_is_refused(bench: Bench) -> None:
    """It would be the list of its letters."""
    with pytest.raises(lever.UsageError, match="runs are a list, not a text; value 'abc'"):
        lever.open(bench.store.path).view("beam", runs="abc")
    with pytest.raises(lever.UsageError, match=r"a list is meant; at Source.runs; value 'abc'"):
        lever.Source(store=bench.store.path, runs="abc")
    with pytest.raises(
        lever.UsageError, match=r"a list is meant; at DataConfig.view; value 'beam'"
    ):
        lever.DataConfig(view="beam")
    with pytest.raises(lever.UsageError, match=r"a list is meant; at EvalRequest.runs"):
        lever.EvalRequest(runs="abc")
    with pytest.raises(lever.UsageError, match=r"a list is meant; at Contest.shots; value '12'"):
        lever.Contest(shots="12")


@pytest.mark.slow
def test_an_unknown_view_comes_with_the_nearest(bench: Bench) -> None:
    with pytest.raises(lever.UsageError, match="there is no such view; value 'beem'") as caught:
        lever.open(bench.store.path).view("beem")
    assert "did you mean beam?" in str(caught.value.hint)


@pytest.mark.long
def test_batches_are_those_of_a_training(
    bench: Bench, view: lever.View, config: lever.TrainConfig
) -> None:
    asked = config.but(data=config.data.but(view=("beam",)))
    data = open_data(lever.Source(store=bench.store.path), asked)
    trained = Loader(data, torch.device("cpu"), batch_size=4)
    batches = view.batches(config)
    for epoch in (0, 1):
        expected = list(trained.batches(data.train, seed=3, epoch=epoch))
        found = list(batches.epoch(epoch))
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.query, other.query)
            assert torch.equal(one.reward, other.reward)
    assert [len(b) for b in batches] == [len(b) for b in batches]  # a pass begins anew
    query, pool = batches.vectors(found[0])
    assert query.shape == (len(found[0]), data.queries.shape[1])
    assert pool is trained.shared or pool is batches.loader.shared


def test_batches_of_another_view_are_refused(view: lever.View, config: lever.TrainConfig) -> None:
    other = config.but(data=config.data.but(view=("beam_sample",)))
    with pytest.raises(lever.UsageError, match="names another view; at beam"):
        view.batches(other)
    scored = config.but(data=config.data.but(scorer="m"))
    with pytest.raises(lever.UsageError, match="names another scorer; at beam; value 'm'"):
        view.batches(scored)


def page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def notebook() -> list[str]:
    cells = json.loads(PAGE.with_name("tour.ipynb").read_bytes())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("blocks", "out"), [(page(), "selector"), long(notebook(), "notebook-selector")]
)
def test_the_page_and_the_notebook_run(
    blocks: list[str],
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Block by block, in one namespace, on a small demo."""
    files = write_world(make_world(WorldSpec(120, 40, 10)), tmp_path / "lever-demo" / "world")
    store = Store.create(tmp_path / "lever-demo" / "store")
    paths = [files.rl_data, files.questions("train"), files.annotations("train")]
    list(ingest(paths, store, IngestOptions(dataset=DATASET, split="train")))
    monkeypatch.chdir(tmp_path)
    assert len(blocks) >= 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    *_, last = capsys.readouterr().out.splitlines()
    assert len(ast.literal_eval(last)) == 2  # two picks of the last question
    assert Path(out, "best.pt").exists()
