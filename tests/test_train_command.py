"""``lever train`` and ``lever convert`` as a user types them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lever_data.options import options
from lever_train.options.resolve import resolve
from lever_train.options.train import TrainConfig
from lever_train.selector.checkpoint import load_selector
from tests.cases import long
from tests.commands import Done, lever
from tests.training import Bench

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_v3_rl.toml"


def _train(bench: Bench, *words: object, check: bool = True, **flags: Any) -> Done:
    given: list[object] = []
    for name, value in bench.flags(**flags).items():
        given += [f"--{name.replace('_', '-')}", value]
    out = bench.folder / "out"
    return lever("train", "--store", bench.store.path, "--out", out, *given, *words, check=check)


@pytest.mark.long
def test_train_then_convert(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    done = _train(bench, "--tied-groups", "keep", "--seed", 0, "--run", bench.run.run)
    assert "rce epoch" in done.stdout and "val pick accuracy" in done.stdout
    assert "[RCE] epochs=2, lr=0.0001" in done.stderr
    assert "training on 32 queries" in done.stderr and "queries/s" in done.stderr
    converted = lever("convert", tmp_path / "out" / "rce_epoch2.pt")
    path = Path(converted.stdout.strip())
    assert path == tmp_path / "out" / "rce_epoch2_v2format.ckpt"
    one, two = load_selector(path)[0].state_dict(), bench.tensors("out")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.long
def test_the_example_of_the_notes(tmp_path: Path) -> None:
    config = resolve(EXAMPLE, {})
    assert (config.rce.epochs, config.rce.lr) == (5, 1e-4)
    assert (config.grpo.epochs, config.grpo.lr, config.grpo.kl_target_max) == (0, 5e-5, 0.05)
    done = _train(Bench(tmp_path), "--config", EXAMPLE, "--grpo-epochs", 1)
    assert "[GRPO] epochs=1, lr=5e-05, kl_beta_init=0.1" in done.stderr
    assert "kl_target_max = 0.05" in done.stderr  # what is not the default is printed
    assert "kl_target_min" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--out", ""], 2, None),
        (["--reward-mode", "hard"], 2, "unknown reward mode"),
        (["--batch-size", "0"], 2, "--batch-size ([run] batch_size)"),
        (["--tied-groups", "maybe"], 2, None),
        long(["--view", "beem"], 2, "did you mean beam?"),
        (["--config", "none.toml"], 2, "the config cannot be read"),
        long(["--gen-method", "nothing"], 1, "holds no rows to train on"),
        (["--resume"], 1, "no training here to resume"),
    ],
)
def test_errors_and_their_exit_codes(
    tmp_path: Path, words: list[str], code: int, message: str | None
) -> None:
    if words == ["--out", ""]:
        done = lever("train", "--store", tmp_path, check=False)
    else:
        done = _train(Bench(tmp_path), *words, check=False)
    assert done.returncode == code, done.stderr
    assert message is None or message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_help_names_every_option() -> None:
    from lever_cli.train import train

    help_text = lever("train", "--help").stdout
    for item in options(TrainConfig):
        assert item.field.description, item.key
        assert item.flag.split("/")[0][:16] in help_text, item.flag
    assert train.__doc__ is not None


def test_every_legacy_flag_exists_with_its_default() -> None:
    """Names and defaults of LEGACY.md, "Training" and "Defaults"."""
    by_flag = {flag: o.field.default for o in options(TrainConfig) for flag in o.flag.split("/")}
    expected = {
        "--rce-epochs": 5,
        "--rce-lr": 1e-4,
        "--grpo-epochs": 0,
        "--grpo-lr": 1e-5,
        "--kl-beta": 0.1,
        "--kl-target-min": 0.01,
        "--kl-target-max": 0.1,
        "--num-layers": 1,
        "--reward-mode": "hard_plus_soft",
        "--hard-weight": 1.0,
        "--soft-weight": 1.0,
        "--rel-weight": 0.1,
        "--reward-alpha": 0.0,
        "--reward-beta": 0.0,
        "--correctness-mode": "01",
        "--use-logprob": False,
        "--skip-fallback": False,
        "--rce-use-raw-reward": False,  # the other side of the switch below
        "--rce-use-normalized-reward": False,
        "--freeze-backbone-in-grpo": False,
        "--top1-only": False,
        "--dropout": 0.1,
        "--label-smoothing": 0.1,
        "--clip-epsilon": 0.2,
        "--advantage-clip": 5.0,
        "--early-epochs": 1,
        "--early-top-k": 3,
        "--late-top-k": 5,
        "--batch-size": 1,
        "--gradient-clip": 1.0,
        "--weight-decay": 0.01,
        "--split-ratio": 0.8,
        "--sft-epochs": 20,
        "--sft-lr": 1e-4,
        "--sft-weight-decay": 1e-3,
        "--warm-up": 0.05,
    }
    assert {flag: by_flag[flag] for flag in expected} == expected
