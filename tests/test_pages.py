"""The pages: one style, nothing from outside, hostile text stays text, and what a browser shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.audit import Audit, audit_views
from lever_data.report.audit_page import audit_page
from lever_data.report.options import AuditRequest
from lever_data.report.page import Chart, Figure, Line, Section, Table, render, selector_colours
from lever_train.evaluate.scoreboard_page import scoreboard_page
from lever_train.evaluate.scores import PairTest, Row, Scoreboard
from lever_train.flow.sweep_page import Cell, SweepReport, sweep_page
from lever_train.learn.curves import curves_page
from lever_train.learn.log import Log
from tests.stores import candidate, commit, new_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
--disable-background-networking --disable-component-update --disable-sync
--allow-file-access-from-files --virtual-time-budget=6000
"""
VOID = {"meta", "link", "br", "img", "input", "hr"}
CHARTS = ("classes", "spread", "sources", "oracle", "modes", "evaluation", "demonstrations",
          "policy", "noise")  # fmt: skip
EVIL = "<script>alert('x')</script>"
KINDS = ("audit", "audits", "evaluation", "curves", "sweep")


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[tuple[str, set[str]]] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.styled: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.words: list[str] = []
        self.code: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [str(given[k]) for k in ("src", "href", "action", "data") if k in given]
        self.styled += [k for k in given if k == "style" or k.startswith("on")]
        if chart := given.get("data-chart"):
            self.charts.append(json.loads(chart))
        if tag == "figure":
            self.figures.append((given.get("class") or given.get("id") or "", set()))
        elif self.figures and "figure" in self.open:
            self.figures[-1][1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.code:
            self.code[self.open[-1]].append(data)
        else:
            self.words.append(data)


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> list[Audit]:
    store = new_store(tmp_path_factory.mktemp("page"))
    rows = [
        candidate(
            query, ordinal, [ordinal, ordinal + 9],
            gen_method=["beam", "sample", EVIL][ordinal % 3],
            temperature=None if ordinal % 3 != 1 else 1.0 + ordinal / 10,
            beam_rank=0 if ordinal == 0 else None,
            logprob_score=-1.0 - ordinal,
            eval_mode=["file", "fallback", None][(query + ordinal) % 3],
            correct=int((query * ordinal) % 4 == 1),
            score=(0.3, 0.6, 1.0)[query % 3] * ((query * ordinal) % 4 == 1),
        )
        for query in range(12)
        for ordinal in range(6)
    ]  # fmt: skip
    commit(store, rows)
    spec = RewardSpec(expression="correct /* " + EVIL.replace("'", "") + " */ + score")
    return audit_views(store, AuditRequest(reward=spec), ["all_candidates", "beam"])


def _scoreboard() -> Scoreboard:
    names = ("random", "nearest", EVIL, "oracle")
    rows = [Row(n, k, 0.1 * k, 0.08 * k, 0.12 * k, 90, 10) for n in names for k in (1, 2, 3, 4)]
    pair = PairTest(EVIL, "random", 1, 0.1, 0.05, 0.15, 0.01, 9, 2, 0.07, 90)
    return Scoreboard(tuple(rows), (pair,), "evaluation-x", {"dataset/split": EVIL})


def _sweep() -> SweepReport:
    cells = [
        Cell(str(k), {"reward.mode": EVIL, "run.seed": k}, 0.2 + k / 99, 0.1, 0.4, None, None, None,
             60, "e", "c.pt", 0.3 - k / 99)
        for k in range(12)
    ]  # fmt: skip
    about = {"dataset/split": EVIL, "answerer": "nearest"}
    return SweepReport("s", tuple(cells), 0.01, "sweep-x", (), 12, True, about)


def _log(val_loss: list[float]) -> Log:
    log = Log()
    for epoch, loss in enumerate(val_loss, 1):
        for step in range(30):
            log.step("rce", epoch, 30 * epoch + step, {"loss": 9.0 / (1 + step), "weight": 1.0})
        log.epoch("rce", epoch, {"train_loss": 5.0 - epoch, "val_loss": loss})
    return log


@pytest.fixture(scope="module")
def pages(audits: list[Audit]) -> dict[str, str]:
    return {
        "audit": audit_page(audits[:1]),
        "audits": audit_page(audits),
        "evaluation": scoreboard_page(_scoreboard()),
        "sweep": sweep_page(_sweep()),
        "curves": curves_page(_log([2.0, 1.0, 3.0]), EVIL, {"reward": EVIL}, f"a = '{EVIL}'"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing_from_outside(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    assert page.open == []
    assert {"link", "img", "iframe", "object", "form", "base"}.isdisjoint(page.tags)
    assert all(target.startswith("#") for target in page.loads)
    assert "url(" not in "".join(page.code["style"])
    assert "@import" not in "".join(page.code["style"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_lets_the_scripts_of_the_page_run_and_nothing_else(
    pages: dict[str, str], kind: str
) -> None:
    page = Page(pages[kind])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', pages[kind])
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in unescape(policy[1]).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name, kinds in (("script-src", "script"), ("style-src", "style")):
        digests = [hashlib.sha256(text.encode()).digest() for text in page.code[kinds]]
        assert rules[name].split() == [
            f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests
        ]
    assert page.styled == []  # inline styles and handlers, which the policy would drop


@pytest.mark.parametrize("kind", KINDS)
def test_texts_from_the_data_are_escaped(pages: dict[str, str], kind: str) -> None:
    assert "<script>alert" not in pages[kind]
    assert "&lt;script&gt;alert" in pages[kind]
    assert Page(pages[kind]).tags.count("script") == 2


def test_phone_and_dark_mode_are_provided_for(pages: dict[str, str]) -> None:
    text = pages["curves"]
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "prefers-color-scheme: dark" in text
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = [set(re.findall(r"(--[a-z0-9]+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", text)) <= names[0]
    used = {line["colour"] for chart in Page(text).charts for line in chart["lines"]}
    assert {f"--{colour}" for colour in used} <= names[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_says_its_column(pages: dict[str, str], kind: str) -> None:
    """On a phone, rows become cards and the heads go: the labels are what is left of them."""
    for table in re.findall(r"<table>.*?</table>", pages[kind], re.DOTALL):
        heads = re.findall(r"<th[^>]*>([^<]*)</th>", table.partition("<tbody>")[0])
        for row in re.findall(r"<tr[^>]*>.*?</tr>", table.partition("<tbody>")[2], re.DOTALL):
            assert re.findall(r'data-label="([^"]*)"', row) == heads[1:]


def test_every_chart_of_an_audit_has_its_sql(pages: dict[str, str]) -> None:
    page = Page(pages["audit"])
    assert [name for name, _ in page.figures] == [f"chart-{name}" for name in CHARTS]
    for name, tags in page.figures:
        assert {"details", "summary", "pre"} <= tags, name
    assert [chart["kind"] for chart in page.charts] == ["bars"]


def test_views_side_by_side_come_first(pages: dict[str, str]) -> None:
    page = Page(pages["audits"])
    assert page.figures[0][0] == "compare"
    assert len(page.figures) == 1 + 2 * len(CHARTS)
    assert {"#view-1", "#view-2"} <= set(page.loads)


@pytest.mark.long
def test_a_flat_view_has_a_page(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1], correct=0, score=0.0)])
    text = audit_page(audit_views(store, AuditRequest(), ["all_candidates"]))
    assert "No query has rewards that differ." in text
    assert "No candidate has a beam rank or a log-probability." in text
    assert Page(text).open == []


def test_what_is_not_finite_has_no_value_in_a_chart() -> None:
    chart = Chart("a", [0, 1], [Line("b", [float("nan"), 2.0])], "x")
    table = Table(("name", "share"), [("a", None), ("b", ("12 %", 0.12)), ("c", 1234)])
    text = render("t", {}, "lever", [Section([Figure("f", chart=chart, table=table)])])
    assert Page(text).charts[0]["lines"][0]["y"] == [None, 2.0]
    assert re.findall(r'data-sort="([^"]*)">([^<]*)<', text) == [
        ("", "–"), ("0.12", "12 %"), ("1234", "1,234"),
    ]  # fmt: skip


def test_a_selector_keeps_its_colour_whatever_stands_beside_it() -> None:
    alone = selector_colours(["best"])
    assert selector_colours(["zero_shot", "best", "nearest"])["best"] == alone["best"]
    many = selector_colours([f"cell {k}" for k in range(12)])
    assert len(set(map(repr, many.values()))) == 12
    assert selector_colours(["sft"]) == {"sft": selector_colours(["oracle", "sft"])["sft"]}


PROBE = """
<script>
addEventListener('load', () => setTimeout(() => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, box = e => e.getBoundingClientRect();
    const all = (css) => [...page.querySelectorAll(css)];
    const small = all('figcaption, td, th, li')
      .filter(e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize) < 11.5);
    const apart = all('.gap').filter(g => {
      const label = box(g.querySelector('span')), value = box(g.querySelector('b'));
      return Math.abs(label.top - value.top) > 3 || label.right > value.left;
    });
    const table = all('.scroll > table:not(.pairs)').find(t => t.tHead.querySelector('button'));
    const column = () => [...table.tBodies[0].rows].map(r => r.cells[2].dataset.sort);
    table?.tHead.rows[0].cells[2].querySelector('button').click();
    const drawn = all('canvas').filter(c => {
      const dots = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      return dots.some(d => d > 0);
    });
    return {
      name: frame.src.split('/').pop() + ' ' + frame.width,
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      small: small.length,
      apart: apart.length,
      sideways: all('.scroll *').filter(
        e => box(e).right > box(e.closest('.scroll')).right + 0.5).length,
      charts: all('[data-chart]').length - drawn.length,
      sorted: table ? column().join() === column().sort((a, b) => b - a).join() : true,
    };
  });
  document.body.textContent = JSON.stringify(found);
}, 500));
</script>
"""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
def test_in_a_browser(pages: dict[str, str], tmp_path: Path) -> None:
    frames = ""
    for kind, text in pages.items():
        (tmp_path / kind).with_suffix(".html").write_text(text)
        frames += "".join(
            f'<iframe src="{kind}.html" width="{width}" height="900"></iframe>'
            for width in (360, 1100)
        )
    (tmp_path / "probe.html").write_text(f"<!doctype html><body>{frames}{PROBE}</body>")
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    body = re.search(r"<body>\s*(\[.*?\])</body>", done.stdout)
    assert body is not None, done.stdout[-500:] + done.stderr[-500:]
    fine = {"overflow": 0, "small": 0, "apart": 0, "sideways": 0, "charts": 0, "sorted": True}
    found = json.loads(body[1])
    assert len(found) == 2 * len(KINDS)
    for frame in found:  # nothing sticks out, is too small or empty; each value beside its label
        assert frame == {"name": frame["name"], **fine}
