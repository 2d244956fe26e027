"""Checkpoints of every format: read whole and safely, written as the legacy code loads them."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lever_data.errors import LeverError, UsageError
from lever_train.options.train import ModelConfig
from lever_train.selector.checkpoint import (
    Progress,
    convert,
    load_selector,
    read_checkpoint,
    save_v3,
)
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Selector
from tests.commands import lever
from tests.shared_data import GOLDEN, needs_shared

LEGACY = ("gated", "decoder", "mmr", "additive", "bilinear", "stop")
FOREIGN = ("lever_lm.sen_model.logit_scale", "lever_lm.sen_model.text_projection.weight")


def _selector(**config: Any) -> Selector:
    torch.manual_seed(3)
    options = {"hidden": 8} | config
    return make_selector(options.pop("dim", 12), ModelConfig.model_validate(options))


def _save(path: Path, selector: Selector) -> Path:
    save_v3(path, selector, Progress(2, "rce", 0.1, {"loss": 1.5}))
    return path


def _same(one: Selector, other: Selector) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def _edited(path: Path, **changes: object) -> Path:
    """A v3 file with tensors replaced (by name, __ for a dot), or removed where None."""
    content = torch.load(path, weights_only=True)
    for key, value in changes.items():
        name = key.replace("__", ".")
        content["model_state_dict"].pop(name, None)
        if value is not None:
            content["model_state_dict"][name] = value
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_layers": 3},
        {"num_layers": 0},
        {"dim": 8},
        {"num_heads": 2},
        {"selector": "gru", "max_shots": 3},
        {"selector": "features", "can_stop": True},
        {"selector": "features", "votes": True, "pair_features": ("vote",)},
        {"selector": "features", "mixture": True, "low_rank": 0},
        *({"selector": kind, "max_shots": 3} for kind in LEGACY),
        {"selector": "mmr", "decoder_gru": False, "step_embedding": False},
    ],
)
def test_v3_and_v2format_round_trip(tmp_path: Path, config: dict[str, Any]) -> None:
    selector = _selector(**config)
    v3 = _save(tmp_path / "rce_epoch2.pt", selector)
    found, checkpoint = load_selector(v3)
    assert _same(found, selector) and found.config == selector.config
    assert (checkpoint.epoch, checkpoint.phase, checkpoint.kl_beta) == (2, "rce", 0.1)
    assert checkpoint.metrics == {"loss": 1.5}
    if selector.config.selector in ("gru", "features"):
        with pytest.raises(LeverError, match="v2format cannot hold a"):
            convert(v3)
        return
    v2, _ = convert(v3)
    assert v2 == tmp_path / "rce_epoch2_v2format.ckpt"
    again, checkpoint = load_selector(v2)
    assert _same(again, selector) and checkpoint.layout == "v2"
    assert again.config == selector.config


def test_v3_is_what_the_legacy_code_expects(tmp_path: Path) -> None:
    content = torch.load(_save(tmp_path / "a.pt", _selector()), weights_only=True)
    assert set(content) >= {"epoch", "phase", "model_state_dict", "kl_beta", "metrics"}
    assert set(content["model_state_dict"]) == {
        "input_proj.weight",
        "cross_attn_layers.0.in_proj_weight",
        "cross_attn_layers.0.in_proj_bias",
        "cross_attn_layers.0.out_proj.weight",
        "cross_attn_layers.0.out_proj.bias",
        "attn_norms.0.weight",
        "attn_norms.0.bias",
        "query_proj.weight",
        "cand_proj.weight",
    }


def test_v2format_names_are_those_that_every_legacy_loader_finds(tmp_path: Path) -> None:
    """The loader of the notes reads ``cross_attn_layers.0``, older code ``cross_attn``; both leave
    out what they do not find, so one layer stands under both names, all of several under theirs."""
    one, _ = convert(_save(tmp_path / "one.pt", _selector()))
    content = torch.load(one, weights_only=True)
    assert content["hyper_parameters"] == {"lr": 1e-4, "weight_decay": 0.001, "warm_steps": 0.05}
    state = {
        name.removeprefix("lever_lm.pointer_selector."): value
        for name, value in content["state_dict"].items()
    }
    v3 = torch.load(tmp_path / "one.pt", weights_only=True)["model_state_dict"]
    assert all(torch.equal(state[name], value) for name, value in v3.items())
    for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert torch.equal(state[f"cross_attn.{part}"], v3[f"cross_attn_layers.0.{part}"])
    assert torch.equal(state["attn_norm.bias"], v3["attn_norms.0.bias"])
    three, _ = convert(_save(tmp_path / "three.pt", _selector(num_layers=3)))
    names = torch.load(three, weights_only=True)["state_dict"]
    assert not any(".cross_attn." in name for name in names)
    for layer in range(3):
        assert f"lever_lm.pointer_selector.cross_attn_layers.{layer}.in_proj_bias" in names


@pytest.mark.parametrize("kind", ["static", "gru", *LEGACY])
def test_the_kind_is_read_off_the_tensors(tmp_path: Path, kind: str) -> None:
    """As a legacy file has it: no entry says what the selector is."""
    selector = _selector(selector=kind, max_shots=3, num_layers=2)
    torch.save({"epoch": 4, "model_state_dict": selector.state_dict()}, tmp_path / "a.pt")
    found, checkpoint = load_selector(tmp_path / "a.pt")
    assert _same(found, selector) and checkpoint.config.selector == kind
    steps = 4 if kind in ("gated", "static") else 3  # those two have nothing per step
    assert checkpoint.config.max_shots == steps


def test_a_decoder_without_its_gru_or_step_embedding_is_read(tmp_path: Path) -> None:
    selector = _selector(selector="additive", decoder_gru=False, step_embedding=False)
    torch.save({"model_state_dict": selector.state_dict()}, tmp_path / "a.pt")
    found, _ = load_selector(tmp_path / "a.pt")
    assert _same(found, selector) and not found.config.decoder_gru


@pytest.mark.parametrize(
    ("tensor", "variant"),
    [
        ("cand_encoder.layers.0.norm1.weight", "V4-4"),
        ("topic_prototypes", "V4-6"),
        ("dpp_proj.weight", "V4-7"),
        ("slot_emb.weight", "V4-8"),
        ("refine_attn.in_proj_weight", "V4-9"),
    ],
)
def test_a_variant_that_lever_does_not_run_is_named(
    tmp_path: Path, tensor: str, variant: str
) -> None:
    state = _selector(selector="decoder").state_dict() | {tensor: torch.zeros(8, 8)}
    torch.save({"model_state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(LeverError, match=f"does not run: {variant}") as error:
        read_checkpoint(tmp_path / "a.pt")
    assert str(error.value.where).endswith(tensor)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    selector = _selector()
    state = {prefix + name: value for name, value in selector.state_dict().items()}
    for content in ({"model_state_dict": state}, state):  # with its frame, and bare
        torch.save(content, tmp_path / "a.pt")
        assert _same(load_selector(tmp_path / "a.pt")[0], selector)


def test_a_selector_in_safetensors_is_read(tmp_path: Path) -> None:
    selector = _selector(selector="gated")
    halves = {name: value.bfloat16() for name, value in selector.state_dict().items()}
    save_file(halves, tmp_path / "a.safetensors")
    found, checkpoint = load_selector(tmp_path / "a.safetensors")
    assert checkpoint.config.selector == "gated"
    for name, value in found.state_dict().items():
        assert torch.equal(value, halves[name].float())
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(LeverError, match="safetensors file cannot be read"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_file_of_torch_before_1_6_says_what_to_do(tmp_path: Path) -> None:
    torch.save(
        {"model_state_dict": _selector().state_dict()},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(LeverError) as error:
        read_checkpoint(tmp_path / "a.pt")
    assert "load and save it again with a newer torch" in str(error.value.hint)


@pytest.mark.parametrize("missing", ["query_proj.weight", "cand_proj.weight", "attn_norms.0.bias"])
def test_one_missing_tensor_of_a_legacy_file_is_named(tmp_path: Path, missing: str) -> None:
    state = dict(_selector().state_dict())
    del state[missing]
    torch.save({"model_state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(LeverError, match=f"the selector needs {missing}"):
        read_checkpoint(tmp_path / "a.pt")


def test_the_short_prefix_of_older_files(tmp_path: Path) -> None:
    selector = _selector()
    v2, _ = convert(_save(tmp_path / "a.pt", selector))
    content = torch.load(v2, weights_only=True)
    content["state_dict"] = {
        k.replace("pointer_selector.", ""): v for k, v in content["state_dict"].items()
    }
    content["state_dict"][FOREIGN[0]] = torch.tensor(1.0)
    torch.save(content, v2)
    found, checkpoint = load_selector(v2)
    assert _same(found, selector) and checkpoint.foreign == FOREIGN[:1]


def test_a_missing_tensor_names_both_sides(tmp_path: Path) -> None:
    path = _edited(_save(tmp_path / "a.pt", _selector()), cand_proj__weight=None)
    with pytest.raises(LeverError) as error:
        read_checkpoint(path)
    assert "the selector needs cand_proj.weight [8, 8], the file lacks it" in str(error.value)


def test_a_wrong_shape_names_both_sides(tmp_path: Path) -> None:
    path = _edited(_save(tmp_path / "a.pt", _selector()), cand_proj__weight=torch.zeros(8, 9))
    with pytest.raises(LeverError) as error:
        read_checkpoint(path)
    assert "cand_proj.weight: the file has [8, 9], the selector needs [8, 8]" in str(error.value)


def test_a_missing_layer_is_seen(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", _selector(num_layers=3))
    content = torch.load(path, weights_only=True)
    content.pop("selector")  # as a legacy file has it
    kept = {k: v for k, v in content["model_state_dict"].items() if "layers.1." not in k}
    torch.save(content | {"model_state_dict": kept}, path)
    with pytest.raises(LeverError, match=r"needs cross_attn_layers\.1\.in_proj_weight"):
        read_checkpoint(path)


def test_a_tensor_of_another_variant_is_refused(tmp_path: Path) -> None:
    path = _edited(_save(tmp_path / "a.pt", _selector()), gate__weight=torch.zeros(2))
    with pytest.raises(LeverError, match="no place for") as error:
        read_checkpoint(path)
    assert error.value.value == "gate.weight"
    assert "cand_proj.weight" in str(error.value.hint)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    path = _edited(_save(tmp_path / "a.pt", _selector()), attn_norm__bias=torch.ones(8))
    with pytest.raises(LeverError, match="two tensors have one place"):
        read_checkpoint(path)


def test_nan_and_integers_are_refused(tmp_path: Path) -> None:
    bad = torch.full((8, 8), torch.nan)
    path = _edited(_save(tmp_path / "a.pt", _selector()), cand_proj__weight=bad)
    with pytest.raises(LeverError, match="NaN or infinity"):
        read_checkpoint(path)
    path = _edited(path, cand_proj__weight=torch.zeros(8, 8, dtype=torch.int64))
    with pytest.raises(LeverError, match="not of floats"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "not a checkpoint"),
        ({"weights": {}}, "it has no model_state_dict"),
        ({"model_state_dict": {}}, "holds no selector"),
        ({"state_dict": {FOREIGN[0]: torch.tensor(1.0)}}, "holds no selector"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(LeverError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UsageError, match=f"^there is no such checkpoint; value '{path}'$"):
            read_checkpoint(path)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    content = torch.load(_save(tmp_path / "a.pt", _selector()), weights_only=True)
    content["hyper_parameters"] = {"x": Attack(), "y": collections.Counter("ab")}
    torch.save(content, tmp_path / "a.pt")
    found, _ = load_selector(tmp_path / "a.pt")
    assert _same(found, _selector())
    assert not (tmp_path / "owned").exists()


@needs_shared
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("selector_k64_s2_l1", ("v3.pt", "v2_lightning.ckpt", "v2_full.ckpt")),
        ("selector_k20_s4_l3", ("v3.pt", "v2_lightning.ckpt")),
    ],
)
def test_real_files_of_one_selector_are_equal(
    name: str, files: tuple[str, ...], tmp_path: Path
) -> None:
    reference = torch.load(GOLDEN / f"{name}.v3.pt", weights_only=True)["model_state_dict"]
    for file in files:
        found, checkpoint = load_selector(GOLDEN / f"{name}.{file}")
        assert found.state_dict().keys() == reference.keys()
        assert all(torch.equal(v, reference[k]) for k, v in found.state_dict().items())
        expected = FOREIGN if file != "v3.pt" else ()
        assert checkpoint.foreign == expected, file
        converted, _ = convert(GOLDEN / f"{name}.{file}", tmp_path / f"{file}.ckpt")
        again, checkpoint = load_selector(converted)
        assert _same(again, found) and checkpoint.foreign == ()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("static", "the newest legacy code (from 2025-12-29) adds a gate"),
        ("mmr", "only the newest legacy code has the mmr selector"),
    ],
)
def test_convert_says_what_legacy_code_makes_of_the_file(
    tmp_path: Path, kind: str, said: str
) -> None:
    done = lever("convert", _save(tmp_path / "a.pt", _selector(selector=kind)))
    assert said in done.stderr
    assert done.stdout.strip() == str(tmp_path / "a_v2format.ckpt")


HUGE_LAYER = "cross_attn_layers.200000000.in_proj_bias"


@pytest.mark.parametrize(
    ("changes", "entry", "message"),
    [
        ({"epoch": float("inf")}, "epoch", "not a finite number of 64 bits"),
        ({"epoch": 10**5000}, "epoch", "not a finite number of 64 bits"),
        ({"kl_beta": 10**400}, "kl_beta", "not a finite number of 64 bits"),
        ({"phase": 10**5000}, "phase", "is not text"),
        ({"selector": {"layers": 200}}, "selector.layers", "more layers than it has tensors"),
        ({"selector": {"layers": 10**8}}, "selector.layers", "less than or equal to 256"),
        ({"selector": {"hidden": 10**9}}, "selector.hidden", "less than or equal to 16384"),
        ({"selector": {"dim": 10**18}}, "selector.dim", "less than or equal to"),
        ({"selector": {"max_shots": 10**18}}, "selector.max_shots", "less than or equal to 1024"),
        ({"selector": {"heads": 10**5000}}, "selector.heads", "shape no selector has"),
        ({"selector": {5: 1}}, "selector", "Keys should be strings"),
    ],
)
def test_an_entry_that_is_none_of_its_kind_is_named(
    tmp_path: Path, changes: dict[str, Any], entry: str, message: str
) -> None:
    path = _save(tmp_path / "a.pt", _selector())
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    torch.save(content, path)
    with pytest.raises(LeverError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value.where).startswith(f"{path}: {entry}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query_proj.weight", torch.tensor(3.0), "is not a matrix"),
        ("query_proj.weight", torch.zeros(0, 8), "is not a matrix"),
        ("query_proj.weight", torch.zeros(20000, 1), "less than or equal to 16384"),
        ("input_proj.weight", torch.tensor(3.0), "is not a matrix"),
        ("step_embedding.weight", torch.tensor(3.0), "is not a matrix"),
        ("query_proj.weight", torch.full((8, 8), 1e300, dtype=torch.float64), "too large for"),
        (HUGE_LAYER, torch.zeros(3), "more layers than it has tensors"),
    ],
)
def test_a_tensor_of_an_impossible_shape_is_named(
    tmp_path: Path, name: str, value: torch.Tensor, message: str
) -> None:
    """In a legacy file, whose shape is read off its tensors; both layouts, within seconds."""
    path = _save(tmp_path / "a.pt", _selector())
    content = torch.load(path, weights_only=True)
    tensors = content["model_state_dict"] | {name: value}
    v2 = {f"lever_lm.pointer_selector.{key}": tensor for key, tensor in tensors.items()}
    for layout in ({"model_state_dict": tensors}, {"state_dict": v2}):
        torch.save(layout, path)
        with pytest.raises(LeverError, match=message) as error:
            read_checkpoint(path)
        assert str(error.value.where).startswith(f"{path}: ")
        assert str(error.value.where).endswith(name)


@pytest.mark.parametrize("name", [5, pytest.param(10**5000, id="huge")])
def test_a_tensor_without_a_name_is_refused(tmp_path: Path, name: int) -> None:
    torch.save({"model_state_dict": {name: torch.zeros(2)}}, tmp_path / "a.pt")
    with pytest.raises(LeverError, match="has no name"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_layer_of_many_digits_has_no_place(tmp_path: Path) -> None:
    name = f"cross_attn_layers.{'9' * 5000}.in_proj_bias"
    path = _edited(_save(tmp_path / "a.pt", _selector()), **{name: torch.zeros(2)})
    with pytest.raises(LeverError, match="no place for"):
        read_checkpoint(path)


def test_an_error_about_many_tensors_stays_short(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.pt", _selector(num_layers=30))
    content = torch.load(path, weights_only=True)
    content["selector"]["hidden"] = 16
    torch.save(content, path)
    with pytest.raises(LeverError, match=r"; and 173 more"):
        read_checkpoint(path)
