"""`curves.html`: what is drawn where, and that every metric says what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import unescape

from lever_train.learn.curves import BINS, HEIGHT, _meaning, curves_page
from lever_train.learn.metrics import Log


def _page(figures: Mapping[str, float] | None = None, steps: int = 3, epochs: int = 2) -> str:
    """Steps with a falling loss and a constant; epochs with these figures."""
    log = Log()
    for step in range(steps):
        log.step("rce", 1, step, {"loss": 9.0 - step, "groups": 32.0})
    for epoch in range(1, epochs + 1):
        log.epoch("rce", epoch, {name: value * epoch for name, value in (figures or {}).items()})
    return curves_page(log, "small & new")


def _figure(page: str, name: str) -> str:
    found = re.search(rf"<figure><figcaption>{name}<.*?</figure>", page, re.S)
    assert found is not None, name
    return found[0]


def _labels(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", figure)


def test_the_page_says_what_it_is() -> None:
    page = _page()
    assert "<title>training curves: small &amp; new</title>" in page
    assert "What the training measured" in page and "<script" not in page


def test_axes_name_their_ends() -> None:
    assert _labels(_figure(_page(), "loss")) == ["step", "7", "9", "0", "2"]
    assert _labels(_figure(_page({"val_loss": 2.0}), "val_loss")) == ["epoch", "2", "4", "1", "2"]
    assert _labels(_figure(_page({"val_loss": 2.0}, epochs=1), "val_loss")) == ["epoch 1", "2"]


def test_a_constant_is_drawn_in_the_middle() -> None:
    figure = _figure(_page(), "groups")
    points = re.search(r'<polyline[^>]* points="([^"]+)"', figure)
    assert points is not None
    heights = {float(place.split(",")[1]) for place in points[1].split()}
    assert len(heights) == 1 and abs(heights.pop() - HEIGHT / 2) < 10
    assert _labels(figure) == ["step", "32", "0", "2"]  # its value stands once


def test_pick_oracle_and_behaviour_share_a_chart() -> None:
    names = ("val_pick_reward", "val_oracle_reward", "val_behaviour_reward", "val_pick_accuracy")
    page = _page(dict(zip(names, (0.5, 1.0, 0.2, 0.4), strict=True)))
    figure = _figure(page, "val_reward")
    drawing, legend = figure.split("</svg>", 1)
    assert drawing.count("<polyline") == 3 and drawing.count("<circle") == 6
    assert _labels(figure) == ["epoch", "0.2", "2", "1", "2"]
    said = unescape(re.sub(r"<[^>]+>", "", legend))
    assert "the selector's pick, last 1 " in said and "best stored candidate, last 2 " in said
    assert _figure(page, "val_accuracy").count("<circle") == 2
    assert "val_oracle_reward" not in page


def test_many_steps_are_drawn_as_bins_with_their_range() -> None:
    figure = _figure(_page(steps=4 * BINS), "loss")
    points = re.search(r'<polyline[^>]* points="([^"]+)"', figure)
    assert points is not None and len(points[1].split()) == BINS
    assert "<polygon" in figure and "<circle" not in figure
    assert _labels(figure)[-2:] == ["0", "959"] and "last -950<" in figure
    assert "<polygon" not in _figure(_page(), "loss")  # no range where every step is shown


def test_a_metric_of_an_epoch_is_explained_as_its_steps_are() -> None:
    assert _meaning("train_kl") == _meaning("kl") != ""
    assert _meaning("a_metric_of_tomorrow") == ""
