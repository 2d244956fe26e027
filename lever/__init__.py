"""lever from Python: what the commands do, as calls.

``lever.open`` gives a store, and its views as Arrow, polars, pandas, a DuckDB relation or batches
for torch; ``train``, ``evaluate``, ``predict`` and ``select`` are the library calls behind the
commands, and take the options the commands are made from. ``docs/python.md`` shows all of it.

Names are imported when first used: ``import lever`` alone loads neither DuckDB nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lever.batches import Batches
    from lever.views import OpenStore, View
    from lever.views import open_store as open
    from lever_data import __version__
    from lever_data.errors import LeverError, UsageError
    from lever_data.relations.reward_spec import RewardSpec
    from lever_train.evaluate.api import predict
    from lever_train.evaluate.api import run_evaluation as evaluate
    from lever_train.learn.train import train
    from lever_train.options.evaluate import Contest, EvalRequest, Questions
    from lever_train.options.pack import SelectRequest
    from lever_train.options.resolve import resolve
    from lever_train.options.rollout import AnswererSpec
    from lever_train.options.train import (
        DataConfig,
        DenseConfig,
        GrpoConfig,
        ModelConfig,
        RceConfig,
        RunConfig,
        SftConfig,
        Source,
        TrainConfig,
    )
    from lever_train.pack.pack import open_selector, select
    from lever_train.pack.packed import PackedSelector, Pick

__all__ = [
    "AnswererSpec",
    "Batches",
    "Contest",
    "DataConfig",
    "DenseConfig",
    "EvalRequest",
    "GrpoConfig",
    "LeverError",
    "ModelConfig",
    "OpenStore",
    "PackedSelector",
    "Pick",
    "Questions",
    "RceConfig",
    "RewardSpec",
    "RunConfig",
    "SelectRequest",
    "SftConfig",
    "Source",
    "TrainConfig",
    "UsageError",
    "View",
    "__version__",
    "evaluate",
    "open",
    "open_selector",
    "predict",
    "resolve",
    "select",
    "train",
]

_TRAIN_OPTIONS = "Data Dense Grpo Model Rce Run Sft Train"
_HOMES = {  # name → where it is defined, and how it is called there
    "open": ("lever.views", "open_store"),
    "OpenStore": ("lever.views", "OpenStore"),
    "View": ("lever.views", "View"),
    "Batches": ("lever.batches", "Batches"),
    "__version__": ("lever_data", "__version__"),
    "LeverError": ("lever_data.errors", "LeverError"),
    "UsageError": ("lever_data.errors", "UsageError"),
    "RewardSpec": ("lever_data.relations.reward_spec", "RewardSpec"),
    "Source": ("lever_train.options.train", "Source"),
    "train": ("lever_train.learn.train", "train"),
    "evaluate": ("lever_train.evaluate.api", "run_evaluation"),
    "predict": ("lever_train.evaluate.api", "predict"),
    "SelectRequest": ("lever_train.options.pack", "SelectRequest"),
    "open_selector": ("lever_train.pack.pack", "open_selector"),
    "select": ("lever_train.pack.pack", "select"),
    **{n: ("lever_train.pack.packed", n) for n in ("PackedSelector", "Pick")},
    "resolve": ("lever_train.options.resolve", "resolve"),
    "AnswererSpec": ("lever_train.options.rollout", "AnswererSpec"),
    **{n: ("lever_train.options.evaluate", n) for n in ("Contest", "EvalRequest", "Questions")},
    **{f"{n}Config": ("lever_train.options.train", f"{n}Config") for n in _TRAIN_OPTIONS.split()},
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own_name = _HOMES[name]
    found: object = getattr(import_module(module), own_name)
    return found


def __dir__() -> list[str]:
    return __all__
