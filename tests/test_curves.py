"""`curves.html`: what is drawn where, and that every metric says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import unescape
from typing import Any

from lever_train.learn.curves import BINS, _meaning, curves_page
from lever_train.learn.log import Log


def _page(figures: Mapping[str, float] | None = None, steps: int = 3, epochs: int = 2) -> str:
    """Steps with a falling loss and a constant; epochs with these figures."""
    log = Log()
    for step in range(steps):
        log.step("rce", 1, step, {"loss": 9.0 - step, "groups": 32.0})
    for epoch in range(1, epochs + 1):
        log.epoch("rce", epoch, {name: value * epoch for name, value in (figures or {}).items()})
    return curves_page(log, "small & new", {"dataset/split": "okvqa/train"}, "[rce]\nepochs = 2\n")


def _charts(page: str) -> dict[str, dict[str, Any]]:
    """The charts by title, in the order of the page."""
    titles = re.findall(r"<figcaption><h2>([^<]+)</h2>", page)
    specs = [json.loads(unescape(spec)) for spec in re.findall(r'data-chart="([^"]+)"', page)]
    return dict(zip(titles, specs, strict=False))


def test_the_page_says_what_it_is() -> None:
    page = _page()
    assert "<title>Training curves: small &amp; new</title>" in page
    assert "<dt>dataset/split</dt><dd>okvqa/train</dd>" in page
    assert "[rce]\nepochs = 2" in page


def test_a_chart_has_the_values_of_its_metric() -> None:
    loss = _charts(_page())["loss"]
    assert (loss["x_label"], loss["x"], loss["smooth"]) == ("step", [0, 1, 2], True)
    assert loss["lines"][0]["y"] == [9, 8, 7] and loss["lines"][0]["low"] is None
    val = _charts(_page({"val_loss": 2.0}))["val_loss"]
    assert (val["x_label"], val["x"], val["lines"][0]["y"]) == ("epoch", [1, 2], [2, 4])


def test_validation_comes_first() -> None:
    charts = _charts(_page({"train_loss": 1.0, "val_loss": 2.0}))
    assert list(charts) == ["val_loss", "train_loss", "loss", "groups"]


def test_pick_oracle_and_behaviour_share_a_chart() -> None:
    names = ("val_pick_reward", "val_oracle_reward", "val_behaviour_reward", "val_pick_accuracy")
    charts = _charts(_page(dict(zip(names, (0.5, 1.0, 0.2, 0.4), strict=True))))
    lines = {line["name"]: line["y"] for line in charts["val_reward"]["lines"]}
    assert lines == {
        "the selector's pick": [0.5, 1.0],
        "best stored candidate": [1.0, 2.0],
        "mean stored candidate": [0.2, 0.4],
    }
    assert len({line["colour"] for line in charts["val_reward"]["lines"]}) == 3
    assert [line["y"] for line in charts["val_accuracy"]["lines"]] == [[0.4, 0.8]]
    assert "val_oracle_reward" not in charts


def test_many_steps_are_drawn_as_bins_with_their_range() -> None:
    chart = _charts(_page(steps=4 * BINS))["loss"]
    line = chart["lines"][0]
    assert len(chart["x"]) == len(line["y"]) == BINS and chart["x"][-1] == 4 * BINS - 1
    assert (line["high"][0], line["y"][0], line["low"][0]) == (9, 7.5, 6)


def test_a_validation_loss_that_rises_while_the_loss_falls_is_remarked_on() -> None:
    def page(val: list[float], train: list[float]) -> str:
        log = Log()
        for epoch, (held_out, trained) in enumerate(zip(val, train, strict=True), 1):
            log.step("rce", epoch, epoch, {"loss": trained})
            log.epoch("rce", epoch, {"train_loss": trained, "val_loss": held_out})
        return curves_page(log, "t", {}, "")

    remark = "RCE: the validation loss is lowest after epoch 2 (1) and rises to 1.5 by epoch 3"
    assert remark in page([2.0, 1.0, 1.5], [3.0, 2.0, 1.0])
    assert "is lowest" not in page([2.0, 1.0, 1.5], [3.0, 2.0, 2.5])  # both rise
    assert "is lowest" not in page([3.0, 2.0, 1.0], [3.0, 2.0, 1.0])  # both fall


def test_a_metric_of_an_epoch_is_explained_as_its_steps_are() -> None:
    assert _meaning("train_kl") == _meaning("kl") != ""
    assert _meaning("a_metric_of_tomorrow") == ""
