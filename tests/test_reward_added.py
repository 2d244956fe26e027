"""A reward mode is one file: added to sql/macros alone, it is in every place that knows modes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import lever_sql
import pytest
from lever_cli.docs import render

from lever_data import catalog
from lever_data.errors import LeverError
from lever_data.relations.reward_spec import RewardSpec
from lever_data.report.audit import audit, audit_views
from lever_data.report.options import AuditRequest
from lever_train.options.sweep import cell_config, load_sweep
from lever_train.options.train import TrainConfig
from tests.training import Bench

BONUS = """\
-- Right answers, and words of the truth.
-- reads:
--   correct weighed by hard_weight
--   token_f1 weighed by rel_weight
-- largest: greatest(hard_weight, 0) + greatest(rel_weight, 0)
create or replace macro reward_bonus(
    correct, token_f1, hard_weight, rel_weight, bonus := 0.25
) as
    hard_weight * coalesce(correct, 0)::double
    + rel_weight * coalesce(token_f1, 0)::double
    + bonus * 0;
"""


def _forget() -> None:
    for read in (catalog.macros, catalog.reward_modes, catalog.builtin, catalog.builtin_reads):
        read.cache_clear()


@pytest.fixture(autouse=True)
def _bonus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The SQL of lever with one more file, in the place of the installed one."""
    copy = tmp_path / "names" / "lever_sql"
    shutil.copytree(Path(str(lever_sql.__file__)).parent, copy)
    (copy / "macros" / "reward_bonus.sql").write_text(BONUS)
    monkeypatch.syspath_prepend(tmp_path / "names")
    monkeypatch.delitem(sys.modules, "lever_sql")
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _bench(folder: Path) -> Bench:
    from tests.training import random_rows

    rows = [{**row, "token_f1": 0.1 * row["candidate"]} for row in random_rows()]
    return Bench(folder, rows)


@pytest.mark.slow
def test_it_trains(tmp_path: Path) -> None:
    result = _bench(tmp_path).train(reward_mode="bonus", rce_epochs=1)
    assert "reward_bonus(" in (result.out / "provenance.json").read_text()


@pytest.mark.long
def test_it_is_audited_and_compared(tmp_path: Path) -> None:
    store = _bench(tmp_path).store
    rows = {row["reward_mode"]: row for row in audit(store, AuditRequest()).figures["reward_modes"]}
    assert rows["bonus"]["num_queries"] == rows["hard_plus_soft"]["num_queries"]
    assert rows["bonus"]["tied_share"] == 0.0 < rows["hard_only"]["tied_share"]
    of_bonus = AuditRequest(reward=RewardSpec(mode="bonus", rel_weight=0.1))
    both = audit_views(store, of_bonus, ["all_candidates", "beam"])
    assert [found.figures["reward"] for found in both] == ["bonus", "bonus"]
    assert all("reward_bonus" in found.sql["mode_rewards"] for found in both)


def test_what_it_reads_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(LeverError, match="reads a column that is null") as caught:
        audit(Bench(tmp_path).store, AuditRequest(reward=RewardSpec(mode="bonus")))
    assert caught.value.value == "token_f1"


def test_it_is_a_cell_of_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('name = "s"\n[grid]\n"reward.mode" = ["hard_plus_soft", "bonus"]\n')
    sweep = load_sweep(file)
    configs = [cell_config(TrainConfig(), sweep, cell, "s.toml") for cell in sweep.settings()]
    assert [config.reward.mode for config in configs] == ["hard_plus_soft", "bonus"]


def test_it_is_in_the_docs() -> None:
    assert "- `bonus`: Right answers, and words of the truth. It reads `correct`" in render()
