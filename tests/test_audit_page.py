"""The audit page: its structure without a browser, and what a real one makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.audit import Audit, AuditRequest, audit_views
from lever_data.report.page import render, write_page
from tests.stores import candidate, commit, new_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
--disable-background-networking --disable-component-update --disable-sync
--allow-file-access-from-files --virtual-time-budget=4000
"""
VOID = {"meta", "link", "br", "img", "input", "hr"}
CHARTS = ("classes", "spread", "sources", "oracle", "modes", "evaluation", "demonstrations",
          "policy", "noise")  # fmt: skip
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[tuple[str, set[str]]] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.loads += [str(given[k]) for k in ("src", "href") if k in given]
        if tag == "figure":
            self.figures.append((given.get("class") or given.get("id") or "", set()))
        elif self.figures and "figure" in self.open:
            self.figures[-1][1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


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
            vqa_correct=int((query * ordinal) % 4 == 1),
            vqa_acc_score=(0.3, 0.6, 1.0)[query % 3] * ((query * ordinal) % 4 == 1),
        )
        for query in range(12)
        for ordinal in range(6)
    ]  # fmt: skip
    commit(store, rows)
    spec = RewardSpec(expression="vqa_correct /* " + EVIL.replace("'", "") + " */ + vqa_acc_score")
    return audit_views(store, AuditRequest(reward=spec), ["all_candidates", "beam"])


def test_every_chart_has_its_sql(audits: list[Audit]) -> None:
    page = Page(render(audits[:1]))
    assert page.open == []
    assert [name for name, _ in page.figures] == [f"chart-{name}" for name in CHARTS]
    for name, tags in page.figures:
        assert {"details", "summary", "pre"} <= tags, name
    for name, tags in page.figures[:5]:
        assert {"svg", "rect"} <= tags, name


def test_the_page_needs_nothing_from_outside(audits: list[Audit]) -> None:
    text = render(audits)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert all(target.startswith("#") for target in page.loads)
    assert "url(" not in text
    assert "@import" not in text


def test_texts_from_the_data_are_escaped(audits: list[Audit]) -> None:
    text = render(audits)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_phone_and_dark_mode_are_provided_for(audits: list[Audit]) -> None:
    text = render(audits[:1])
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "prefers-color-scheme: dark" in text
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = [set(re.findall(r"(--[a-z]+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[a-z]+)\)", text)) <= names[0]


def test_every_cell_says_its_column(audits: list[Audit]) -> None:
    """On a phone, rows become cards and the heads go: the labels are what is left of them."""
    for table in re.findall(r"<table>.*?</table>", render(audits), re.DOTALL):
        heads = re.findall(r"<th[^>]*>([^<]*)</th>", table.partition("<tbody>")[0])
        for row in re.findall(r"<tr>.*?</tr>", table.partition("<tbody>")[2], re.DOTALL):
            assert re.findall(r'data-label="([^"]*)"', row) == heads[1:]


def test_views_side_by_side_come_first(audits: list[Audit]) -> None:
    page = Page(render(audits))
    assert page.figures[0][0] == "compare"
    assert len(page.figures) == 1 + 2 * len(CHARTS)
    assert {"#view-1", "#view-2"} <= set(page.loads)


def test_a_flat_view_has_a_page(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    commit(store, [candidate(0, 0, [1], vqa_correct=0, vqa_acc_score=0.0)])
    text = render(audit_views(store, AuditRequest(), ["all_candidates"]))
    assert "No query has rewards that differ." in text
    assert "No candidate has a beam rank or a log-probability." in text
    assert Page(text).open == []


PROBE = """
<script>
addEventListener('load', () => {
  const frame = document.querySelector('iframe'), page = frame.contentDocument;
  const bars = [...page.querySelectorAll('figure rect')].map(r => r.getBoundingClientRect());
  const small = [...page.querySelectorAll('figcaption, td, th, li')]
    .filter(e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize) < 11.5);
  const box = e => e.getBoundingClientRect();
  const apart = [...page.querySelectorAll('.gap')].filter(g => {
    const label = box(g.querySelector('span')), value = box(g.querySelector('b'));
    return Math.abs(label.top - value.top) > 3 || label.right > value.left;
  });
  const sideways = [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth);
  document.title = JSON.stringify({
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    bars: bars.filter(b => b.width > 0 && b.height > 0).length,
    small: small.length,
    apart: apart.length,
    sideways: sideways.length,
    figures: page.querySelectorAll('figure').length,
  });
  document.body.textContent = document.title;
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
@pytest.mark.parametrize("width", [360, 390, 1100])
def test_in_a_browser(audits: list[Audit], tmp_path: Path, width: int) -> None:
    write_page(tmp_path / "page.html", audits)
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px"></iframe>'
    (tmp_path / "probe.html").write_text(f"<!doctype html><body>{frame}{PROBE}</body>")
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<body>\s*(\{.*?\})", done.stdout)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    assert '"overflow":0' in found[1]  # nothing sticks out sideways
    assert '"small":0' in found[1]
    assert '"apart":0' in found[1]  # each value stands on the line of its own label
    assert '"sideways":0' in found[1]  # every column of a table is on the screen
    assert f'"figures":{1 + 2 * len(CHARTS)}' in found[1]
    assert int(re.findall(r'"bars":(\d+)', found[1])[0]) > 40
