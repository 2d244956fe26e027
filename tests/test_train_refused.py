"""What a training refuses: data, vectors, losses and options that do not fit, each by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch

from lever_data.errors import LeverError, UsageError
from lever_data.options import flag_of, options, tables_of
from lever_data.store.schema import CANDIDATES
from lever_data.store.store import RunSpec
from lever_data.toml import validated
from lever_train.learn import validate
from lever_train.options.resolve import resolve, to_toml
from lever_train.options.train import TrainConfig
from lever_train.selector.model import Selector
from tests.cases import long
from tests.stores import new_store, table
from tests.training import POOL, QUERIES, Bench, equal, random_rows


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        long({"view": ["beams"]}, "no such view"),
        ({"query_embeddings": "none.pt"}, "no such embeddings file"),
        ({"reward_mode": "hard_plus_sofd"}, "unknown reward mode"),
        ({"reward_mode": "hard01_plus_gtprob"}, "null in every row"),
        ({"gen_method": ["retrieval"]}, "holds no rows to train on"),
        ({"rce_epochs": 0}, "nothing to train"),
        ({"scorer": "nobody", "view": ["balanced"]}, "no rows"),
    ],
)
def test_what_cannot_be_trained_on(bench: Bench, flags: dict[str, Any], message: str) -> None:
    if "scorer" in flags:  # rows without a scorer match any: give them one
        rows = [row | {"scorer": "vlm"} for row in random_rows()]
        bench = Bench(bench.folder / "other", rows)
    with pytest.raises(LeverError, match=message):
        bench.train(**flags)


@pytest.mark.slow
def test_scorers_and_splits_are_not_mixed(tmp_path: Path) -> None:
    rows = [row | {"scorer": "ab"[row["query_id"] % 2]} for row in random_rows()]
    bench = Bench(tmp_path, rows)
    with pytest.raises(UsageError, match="scores of several models") as error:
        bench.train()
    assert error.value.value == "a, b"
    bench.train("one", scorer="a", rce_epochs=1)
    other = [row | {"dataset": "e", "scorer": "a"} for row in random_rows(1)]
    store = bench.store
    with store.begin(RunSpec(kind="rl_data", dataset="e", split="train", source_sha256="e")) as w:
        w.write("candidates", table(CANDIDATES, other))
        w.commit()
    with pytest.raises(UsageError, match="mixes datasets or splits") as error:
        bench.train("mixed", scorer="a")
    assert error.value.value == "d/train, e/train"


@pytest.mark.slow
@pytest.mark.parametrize(("column", "named"), [long("split", "d/train, d/val"), ("scorer", "a, b")])
def test_a_mix_that_only_validation_holds_is_refused(
    tmp_path: Path, column: str, named: str
) -> None:
    """The last queries by id validate: a training on one place, or model, judged by another."""
    words = ("train", "val") if column == "split" else ("a", "b")
    rows = [row | {column: words[row["query_id"] >= 0.8 * QUERIES]} for row in random_rows()]
    with pytest.raises(UsageError, match=r"mixes datasets or splits|several models") as error:
        Bench(tmp_path, rows).train()
    assert error.value.value == named
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["id", long("hash")])
def test_the_split_and_the_pool_are_those_of_the_views_own_place(tmp_path: Path, by: str) -> None:
    """Equal query ids of another dataset, in the same store, change nothing at all."""
    here, mixed = Bench(tmp_path / "here"), Bench(tmp_path / "mixed")
    others = [row | {"dataset": "c", "pointer": [30, 31]} for row in random_rows(1)]
    with mixed.store.begin(RunSpec("rl_data", "c", "train", source_sha256="c")) as writer:
        writer.write("candidates", table(CANDIDATES, others))
        writer.commit()
    views = mixed.store.path / "views"
    views.mkdir()
    (views / "mine.sql").write_text("select * from all_candidates where dataset = 'd'")
    here.train(split_by=by, rce_epochs=1)
    mixed.train(split_by=by, rce_epochs=1, view=["mine"])
    assert equal(here.tensors("out"), mixed.tensors("out"))
    assert here.said[0] == mixed.said[0]


@pytest.mark.long
def test_a_loss_that_is_not_finite_names_step_and_queries(bench: Bench) -> None:
    bench.train("good", rce_epochs=1)
    content = torch.load(bench.folder / "good" / "last.pt", weights_only=True)
    content["model_state_dict"]["query_proj.weight"] *= 1e30
    content["model_state_dict"]["attn_norms.0.weight"] *= 1e30
    torch.save(content, bench.folder / "huge.pt")
    with pytest.raises(LeverError, match=r"is not finite at step 0 of rce") as error:
        bench.train("bad", sft_checkpoint=str(bench.folder / "huge.pt"))
    assert str(error.value.where).startswith("queries [")
    assert not (bench.folder / "bad").exists()
    bench.train("bad", rce_epochs=1)  # the corrected command is not barred


@pytest.mark.long
def test_a_training_that_fails_later_leaves_what_it_finished(bench: Bench) -> None:
    """Its checkpoint is worth something: whoever replaces it says so."""
    with pytest.raises(LeverError, match="not finite"):
        bench.train(rce_epochs=1, grpo_epochs=1, grpo_lr=1e38)
    assert (bench.folder / "out" / "rce_epoch1.pt").exists()
    bench.train(overwrite=True)


@pytest.mark.long
def test_what_fails_in_a_folder_with_other_files_takes_back_its_own_alone(bench: Bench) -> None:
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / "notes.txt").write_text("mine")
    with pytest.raises(LeverError, match="every group is tied"):
        bench.train(reward="1")
    assert [path.name for path in (bench.folder / "out").iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [{"rce_lr": 1e300}, long({"rce_lr": 1e38, "weight_decay": 1e38}), long({"rce_lr": 1e30})],
)
def test_weights_that_are_not_finite_are_not_written(bench: Bench, flags: dict[str, Any]) -> None:
    """The last step of an epoch has no loss after it: its only batch makes the weights NaN."""
    whole = {"batch_size": 100, "weight_decay": 1e30} | flags
    with pytest.raises(LeverError, match="weights are not finite after epoch 1 of rce, step 1"):
        bench.train(rce_epochs=1, **whole)
    assert not list((bench.folder / "out").glob("*epoch*")) + list(bench.folder.glob("out/*st.pt"))


@pytest.mark.long
def test_a_good_checkpoint_stays_where_a_later_epoch_ends_in_nan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train("one", rce_epochs=1)
    judge = validate.group_figures

    def figures(selector: Selector, *rest: Any) -> dict[str, torch.Tensor]:
        found = judge(selector, *rest)
        wrong = torch.nan if (bench.folder / "out" / "best.pt").exists() else 1.0
        return found | {"val_ess": found["val_ess"] * wrong}

    monkeypatch.setattr(validate, "group_figures", figures)
    with pytest.raises(LeverError, match=r"figure is not finite after epoch 2 of rce.*val_ess"):
        bench.train()
    assert equal(bench.tensors("out", "best.pt"), bench.tensors("out", "rce_epoch1.pt"))
    assert not (bench.folder / "out" / "rce_epoch2.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"rce_lr": "inf"},
        {"weight_decay": "inf"},
        {"gradient_clip": "nan"},
        {"rce_temperature_start": "inf"},
        {"hard_weight": "nan"},
        {"shot_weights": (0.5, float("inf"))},
        {"importance_cap": "inf"},
    ],
)
def test_numbers_of_the_config_are_finite(bench: Bench, flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="finite number"):
        bench.train(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_layers": 100_000_000}, "less than or equal to 256"),
        ({"hidden_dim": 99_999_999}, "less than or equal to 16384"),
        ({"max_shots": 10**18}, "less than or equal to 1024"),
        ({"hidden_dim": 16384, "num_layers": 256}, "parameters, at most 1,000,000,000"),
    ],
)
def test_a_selector_beyond_all_measure_is_refused(
    bench: Bench, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench.train(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"memory_limit": "lots"}, "a number and a unit, such as 600MB"),
        ({"memory_limit": "-1"}, "a number and a unit"),
        ({"memory_limit": "600"}, "a number and a unit"),
        ({"memory_limit": "1KB"}, "the stream needs 32MB"),
        ({"memory_limit": "99999999999TB"}, "there is no more than"),
        ({"threads": 100_000}, "less than or equal to 1024"),
        ({"sft_checkpoint": "a\0b"}, "null character"),
        ({"view": ["beam", "a\0b"]}, "null character"),
    ],
)
def test_what_no_machine_can_do_is_refused(
    bench: Bench, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench.train(**flags)


@pytest.mark.parametrize("amount", ["32MB", "1.5 gb", "600MiB", "2TB"])
def test_amounts_of_memory(amount: str) -> None:
    config = resolve(None, {"run.memory_limit": amount})
    with duckdb.connect() as con:
        con.execute("set memory_limit = ?", [config.run.memory_limit])


@pytest.mark.slow
def test_missing_vectors_name_the_query(bench: Bench) -> None:
    torch.save(torch.randn(POOL, 6), bench.folder / "few.pt")
    with pytest.raises(LeverError, match="12 rows, none for a query") as error:
        bench.train(query_embeddings=str(bench.folder / "few.pt"))
    assert str(error.value.where).endswith("few.pt, query 39")
    assert not (bench.folder / "out").exists(), "the right file can be given with the same --out"
    torch.save(torch.randn(3, 6), bench.folder / "few.pt")
    with pytest.raises(LeverError, match="3 rows, none for example"):
        bench.train("b", candidate_embeddings=str(bench.folder / "few.pt"))
    torch.save(torch.randn(40, 5), bench.folder / "narrow.pt")
    with pytest.raises(LeverError, match="different widths") as error:
        bench.train("c", candidate_embeddings=str(bench.folder / "narrow.pt"))
    assert error.value.value == "6 and 5"


def test_the_config_file_and_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[rce]\nepochs = 7\nlr = 2e-4\n[grpo]\nkl_target_max = 0.05\n")
    config = resolve(file, {"rce.epochs": 2, "data.view": ["beam"]})
    assert (config.rce.epochs, config.rce.lr, config.grpo.kl_target_max) == (2, 2e-4, 0.05)
    assert config.data.view == ("beam",)
    file.write_text(to_toml(config))
    assert resolve(file, {}) == config
    assert resolve(None, {}) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[rce]\nepoch = 7\n", "unknown key", "did you mean epochs?"),
        ("[gpro]\nepochs = 7\n", "unknown key", "did you mean grpo?"),
        ("[rce]\nepochs = -1\n", "greater than or equal to 0", None),
        ("[rce]\nlr = 'fast'\n", "valid number", None),
        ("rce = 3\n", "not a table", None),
        ("[rce\n", "not TOML", None),
        ("[rce]\nrank = true\ntop1_only = true\n", "choose one of", None),
        ("[model]\nnum_heads = 3\n", "does not divide", None),
        (f"x = {'[' * 20_000}\n", "nested too deeply", None),
        (f"[rce]\nepochs = {'9' * 5000}\n", "not TOML", None),
        ('[model]\nsft_checkpoint = "a\\u0000b"\n', "null character", None),
    ],
)
def test_a_bad_config_file(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        resolve(tmp_path / "c.toml", {})
    assert error.value.hint == hint


@pytest.mark.slow
def test_an_empty_store(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [])
    bench.store = new_store(tmp_path / "empty")
    with pytest.raises(LeverError, match=r"no rows|no runs"):
        bench.train()


def test_a_list_of_numbers_is_written_with_commas() -> None:
    choices = list(options(TrainConfig))

    def config_of(*texts: str) -> TrainConfig:
        given = tables_of(choices, {"reward__shot_weights": list(texts)})
        return validated(TrainConfig, given, "the option", flag_of(choices))

    for texts in (["0.5, 0.3,0.2"], ["0.5", "0.3,0.2"]):
        assert config_of(*texts).reward.shot_weights == (0.5, 0.3, 0.2)
    with pytest.raises(UsageError, match="valid number") as caught:
        config_of("0.5,half")
    assert "--shot-weights" in str(caught.value.where)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "no such device"), ("cuda:99", "torch sees"), ("meta", "no such device")],
)
def test_a_device_that_is_not_there(bench: Bench, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        bench.train(device=name)
    assert "cpu" in str(caught.value.hint)


def test_sft_takes_the_beams_where_no_view_is_named() -> None:
    assert resolve(None, {"run.stage": "sft"}).data.view == ("beam_infoscore",)
    assert resolve(None, {"run.stage": "sft", "data.view": ["mine"]}).data.view == ("mine",)
    assert resolve(None, {}).data.view == ("all_candidates",)
