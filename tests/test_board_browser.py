"""`lever board` in a browser, on the demo's store: each page light and dark, wide and narrow.

After the long version, screenshots of what was seen lie in build/board/, to be looked at.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lever_board.board import Board
from lever_board.export import export
from lever_board.page import PAGES_SHOWN
from lever_board.server import Serving
from lever_data.relations.db import connect
from lever_data.store.store import Store
from lever_train.learn.log import Log
from tests.boards import board_store
from tests.conftest import DemoDone

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHOTS = Path(__file__).resolve().parents[1] / "build" / "board"
DEEP = {  # pages that others lead to
    "run": "run?run=rl_data",
    "query": "query?dataset=demo&split=train&id=7",
    "query-val": "query?dataset=demo&split=val&id=3",
    "disagree": "disagree?run=evaluation&a=sft&b=random&shots=2",
    "disagree-oracle": "disagree?run=evaluation&only=1&shots=1",
    "compare-views": "compare?a=beam&b=all_candidates",
    "view-sql": "view?sql=select+gen_method,+count(*)+as+n+from+all_candidates+group+by+1",
    "queries-wrong": "queries?filter=all_wrong",
    "refusal": "view?view=nowhere",
}
ADDRESSES = {**{name: name for name in PAGES_SHOWN}, **DEEP}
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt install chromium)"),
]


class Visit:
    """A page of the browser, what it asked for and what it complained of."""

    def __init__(self, page: Any, base: str) -> None:
        self.page, self.base = page, base
        self.complaints: list[str] = []
        page.on("console", lambda said: self.complaints.append(said.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._require_inside(request.url))

    def _require_inside(self, url: str) -> None:
        if not url.startswith(self.base):
            self.complaints.append(f"asked for {url}")

    def go(self, address: str) -> None:
        """Open a page of the board, and wait for what is being made."""
        self.page.goto(f"{self.base}/{address}")
        self.page.wait_for_selector("main h1")
        while self.page.get_by_text("This is being computed").count():
            self.page.wait_for_timeout(200)
        self.page.wait_for_selector("[data-awaited]", state="detached", timeout=120_000)

    def see(self, title: str) -> None:
        """Wait until a page with this title is there, scripts and all."""
        self.page.wait_for_selector(f"h1:has-text('{title}')")
        self.page.wait_for_load_state()


@pytest.fixture(scope="module")
def demo(demo_done: DemoDone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board") / "demo"
    return Path(shutil.copytree(demo_done.folder, folder, symlinks=True))


@pytest.fixture(scope="module")
def serving(demo: Path) -> Iterator[Serving]:
    (demo / "live").mkdir()
    made = Serving(Board(Store.open(demo / "store"), trainings=[demo / "live"]))
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    made.server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any, serving: Serving) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def open_page(width: int = 1200, scheme: str = "light") -> Visit:
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        return Visit(contexts[-1].new_page(), serving.address.rpartition("/")[0])

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("long", [False, True])
def test_every_page_opens_and_fits(visit: Callable[..., Visit], long: bool) -> None:
    """Each is opened once, in a narrow window and dark, then seen wide, dark and light; the long
    version opens those that others lead to as well, and keeps a picture of each."""
    seen = visit(400, "dark")
    SHOTS.mkdir(parents=True, exist_ok=True)
    for name, address in ADDRESSES.items():
        if not (long or name in PAGES_SHOWN or name in ("query-val", "refusal")):
            continue
        seen.page.set_viewport_size({"width": 400, "height": 900})
        seen.go(address)
        assert seen.page.evaluate(UNLABELLED) == [], name
        for width, scheme in ((400, "dark"), (1200, "dark"), (1200, "light")):
            seen.page.set_viewport_size({"width": width, "height": 900})
            seen.page.emulate_media(color_scheme=scheme)
            seen.page.wait_for_function(f"{SIDEWAYS} === 0")
            if width > 400:  # which changes no colour
                assert seen.page.evaluate(FAINT) == [], (name, scheme)
            if long:
                seen.page.screenshot(path=SHOTS / f"{name}-{scheme}-{width}.png")
        seen.page.emulate_media(color_scheme="dark")
    expected = [c for c in seen.complaints if "status of 400" in c]  # of the page that refuses
    assert seen.complaints == expected and len(expected) == 1


SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNLABELLED = """[...document.querySelectorAll(
    'input:not([type=hidden]), select, textarea, img:not([alt]), svg[role=img]:not([aria-label])')]
  .filter(e => !(e.labels?.length || e.ariaLabel || e.alt)).map(e => e.outerHTML)"""


FAINT = """(() => {
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const numbers = c => c.match(/[\\d.]+/g).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('main *, nav *')].filter(e => e.closest('svg, canvas, .uplot, option') === null)
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .filter(e => getComputedStyle(e).opacity === '1')
    .filter(e => {
      const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
    }).map(e => e.outerHTML.slice(0, 120));
})()"""  # noqa: E501 - a script


def test_from_an_evaluation_down_to_a_query(visit: Callable[..., Visit], demo: Path) -> None:
    seen = visit()
    seen.go("evaluation")
    con = connect(demo / "store")
    rows = con.sql("""
        select a.query_id, a.accuracy as a, b.accuracy as b
        from evaluations as a
        inner join evaluations as b using (run, dataset, split, query_id, shots)
        where a.selector = 'rce' and b.selector = 'nearest' and shots = 2
            and a.accuracy <> b.accuracy
        order by a.accuracy - b.accuracy, a.query_id
    """).fetchall()
    seen.page.get_by_role("link", name="rce − nearest", exact=True).nth(1).click()
    seen.see("rce and nearest disagree, 2 shots")
    assert seen.page.get_by_text(f"{len(rows):,}", exact=True).count()
    cells = seen.page.locator("tbody tr").first.locator("td").all_inner_texts()
    assert cells[:2] == [f"{rows[0][1]:.3f}", f"{rows[0][2]:.3f}"]
    seen.page.locator("tbody th a").first.click()
    seen.see(f"Query {rows[0][0]}")
    assert seen.complaints == []


def test_filters_of_a_view_lead_to_the_rows_of_sql(visit: Callable[..., Visit], demo: Path) -> None:
    seen = visit()
    seen.go("view")
    seen.page.get_by_label("Where").select_option("gen_method")
    seen.page.get_by_label("value").fill("sample")
    seen.page.get_by_role("button", name="Apply").click()
    seen.page.wait_for_selector(".chip")
    sql = "select count(*) from all_candidates where gen_method = 'sample'"
    count = connect(demo / "store").sql(sql).fetchall()[0][0]
    assert seen.page.locator(".facts dd").first.inner_text() == f"{count:,}"
    seen.page.get_by_label("SQL", exact=True).fill("select 40 + 2 as answer")
    seen.page.get_by_role("button", name="Run").click()
    seen.see("Your query")
    assert seen.page.locator("td.figure").inner_text() == "42"


def test_keys_go_from_query_to_query(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.go("query?dataset=demo&split=train&id=7")
    seen.page.keyboard.press("ArrowRight")
    seen.see("Query 8")
    seen.page.keyboard.press("k")
    seen.see("Query 7")
    seen.page.keyboard.press("?")
    assert seen.page.get_by_role("dialog", name="Keys").is_visible()
    seen.page.keyboard.press("Escape")
    seen.page.get_by_label("Reward mode").select_option("soft_only")
    seen.page.get_by_role("button", name="Switch").click()
    seen.page.wait_for_url("**mode=soft_only**")


def test_the_picks_of_checkpoints_come_by_themselves(
    visit: Callable[..., Visit], demo: Path
) -> None:
    """Those of the one that was evaluated are the evaluation's."""
    seen = visit()
    seen.page.goto(f"{seen.base}/query?dataset=demo&split=val&id=3")
    assert seen.page.locator("#picks table").count() in (0, 1)  # it waits for no process
    seen.page.wait_for_selector("#picks table", timeout=120_000)
    sql = """
        select pointer from evaluations
        where selector = 'sft' and shots = 4 and split = 'val' and query_id = 3
    """
    ((pointer,),) = connect(demo / "store").sql(sql).fetchall()
    row = seen.page.locator("#picks tbody tr").filter(has_text="sft_epoch")
    assert row.locator(".pair .note").all_inner_texts()[:4] == [str(n) for n in pointer]
    assert seen.complaints == []


def test_a_live_training_moves_the_curve(visit: Callable[..., Visit], demo: Path) -> None:
    log, file = Log(), demo / "live" / "metrics.parquet"

    def epoch(number: int) -> None:
        log.epoch("rce", number, {"val_loss": 2.0 / number})
        pq.write_table(log.table(), file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)

    epoch(1)
    epoch(2)
    seen = visit()
    seen.go("training")
    chart = seen.page.locator("[data-chart]").first
    assert json.loads(chart.get_attribute("data-chart"))["lines"][0]["y"] == [2.0, 1.0]
    before = chart.locator("canvas").evaluate("c => c.toDataURL()")
    epoch(3)
    seen.page.wait_for_selector("""[data-chart*='"x": [1.0, 2.0, 3.0]']""")
    assert chart.locator("canvas").evaluate("c => c.toDataURL()") != before
    file.unlink()
    assert seen.complaints == []


def test_an_export_opens_from_disk(browser: Any, tmp_path: Path) -> None:
    """A page of each name, of a store whose texts would be scripts if they could."""
    board = Board(board_store(tmp_path))
    done = export(board, tmp_path / "pages", queries=5)
    board.close()
    context = browser.new_context()
    seen = Visit(context.new_page(), (tmp_path / "pages").as_uri())
    seen.page.on("dialog", lambda dialog: seen.complaints.append(dialog.message))
    files = {path.name for path in (tmp_path / "pages").glob("*.html")}
    assert len(files) == done.pages and {f"{name}.html" for name in PAGES_SHOWN} - files == {
        "store.html"  # which is index.html
    }
    assert len([name for name in files if name.startswith("query-")]) == 5
    for name in {re.split("[-.]", name)[0]: name for name in sorted(files)}.values():
        seen.go(name)
        assert seen.page.locator("form, main script").count() == 0
    for name in files:
        links = re.findall(r'href="([^"#]*)', (tmp_path / "pages" / name).read_text())
        assert {link for link in links if not link.startswith("static/")} <= {*files, ""}
    assert seen.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "flex"
    seen.go("training.html")
    assert seen.page.locator("canvas").count() > 0
    context.close()
    assert seen.complaints == []
