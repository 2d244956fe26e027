"""The legacy selector's own figures: logits, picks, log-probabilities, RCE, advantages, GRPO.

What follows from the scores is tested from figures kept here; the network itself needs the weights,
which lie in ../shared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lever_train.learn import losses
from lever_train.options.train import GrpoConfig, ModelConfig
from lever_train.selector.kinds import make_selector
from lever_train.selector.model import Selector, Steps, static_steps
from tests.picks import greedy
from tests.selectors import first_scores, sequence_log_prob
from tests.shared_data import GOLDEN, needs_shared

DATA = Path(__file__).parent / "data" / "golden"
NAMES = ("selector_k64_s2_l1", "selector_k20_s4_l3")
Golden = dict[str, Tensor]


def _close(found: Tensor, expected: Tensor, what: str | None = None) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=what)


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(DATA / f"{request.param}.npz") as figures:
        return {name: torch.tensor(figures[name]) for name in figures}


def _steps(golden: Golden) -> Steps:
    labels = golden["labels"]
    scores = golden["logits_teacher_first"][:, 0]
    return static_steps(scores, labels, torch.ones_like(labels, dtype=torch.bool))


def _all(golden: Golden) -> Tensor:
    return torch.ones_like(golden["rewards"], dtype=torch.bool)


def test_log_probabilities_in_closed_form(golden: Golden) -> None:
    _close(_steps(golden).sequence_log_prob(), golden["log_probs"])


@pytest.mark.parametrize("tau", [2.0, 1.0, 0.5])
def test_rce(golden: Golden, tau: float) -> None:
    mask = _all(golden)
    weights = losses.rce_weights(golden["rewards"], mask, tau)
    loss = losses.rce_groups(_steps(golden).cross_entropy(0.1), weights).mean()
    _close(loss, golden[f"rce_tau{tau}"])


def test_rce_of_legacy_ranks(golden: Golden) -> None:
    """Legacy ranks break ties by sort order; with those ranks the loss is the legacy one."""
    rewards, mask = golden["rewards"], _all(golden)
    ordinal = rewards.argsort(dim=-1, stable=True).argsort(dim=-1).float() / 8
    cross_entropy = _steps(golden).cross_entropy(0.1)
    loss = losses.rce_groups(cross_entropy, losses.rce_weights(ordinal, mask, 1.0)).mean()
    _close(loss, golden["rce_rank_tau1"])
    untied = torch.tensor([2, 3])
    _close(losses.ranks(rewards, mask)[untied], ordinal[untied])


def test_top1_and_sft(golden: Golden) -> None:
    labels = golden["labels"]
    loss = losses.one_candidate_groups(
        _steps(golden).cross_entropy(0.1),
        torch.ones_like(labels, dtype=torch.bool),
        torch.zeros(4, dtype=torch.long),
    ).mean()
    _close(loss, golden["rce_top1"])
    _close(loss, golden["sft_loss_first"])


def test_advantages(golden: Golden) -> None:
    rewards, mask = golden["rewards"], _all(golden)
    zscore = losses.advantages(rewards, mask, "zscore", floor=losses.SUBSET_STD_FLOOR)
    _close(zscore, golden["advantage"])
    centred = losses.advantages(rewards, mask, "center")
    _close(centred, golden["advantage_center"])
    ranked = losses.advantages(rewards, mask, "rank")
    _close(ranked[2:], golden["advantage_rank"][2:])  # untied


@pytest.mark.parametrize(("name", "k"), [("topNone", None), ("top3", 3)])
def test_grpo(golden: Golden, name: str, k: int | None) -> None:
    rewards, mask = golden["rewards"], _all(golden)
    chosen = mask
    if k is not None:  # the legacy pick among ties is torch.topk's own
        chosen = torch.zeros_like(mask).scatter(1, rewards.topk(k).indices, True)
    advantage = losses.advantages(rewards, chosen, floor=losses.SUBSET_STD_FLOOR)
    terms = losses.grpo_terms(
        log_prob=golden["log_probs"],
        reference=golden["old_log_probs"],
        advantage=advantage,
        chosen=chosen,
        importance=torch.ones_like(rewards),
        options=GrpoConfig(),
    )
    ppo, kl = terms["ppo"].mean(), terms["kl"].mean()
    kept = advantage[chosen]
    found = {
        "loss": ppo + 0.1 * kl,
        "ppo_loss": ppo,
        "kl_loss": 0.1 * kl,
        "kl": kl,
        "mean_ratio": terms["ratio"][chosen].mean(),
        "mean_advantage": kept.mean(),
        "std_advantage": kept.std(),
        "max_advantage": kept.abs().max(),
    }
    for key, value in found.items():
        _close(value, golden[f"grpo_{name}_{key}"], key)


def test_greedy_picks_follow_the_scores(golden: Golden) -> None:
    scores = golden["logits_teacher_first"][:, 0]
    shots = golden["labels"].shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :shots]
    _close(order, golden["greedy"])


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_the_network(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as figures:
        golden = {key: torch.tensor(figures[key]) for key in figures}
    selector = _load(name)
    query, candidates, labels = golden["query_emb"], golden["cand_emb"], golden["labels"]
    scores = first_scores(selector, query, candidates)
    _close(scores, golden["logits_teacher_first"][:, 0])
    log_probs = sequence_log_prob(selector, query, candidates, labels)
    _close(log_probs, golden["log_probs"])
    picks = greedy(selector, query, candidates, labels.shape[-1])
    _close(torch.from_numpy(picks.positions), golden["greedy"])


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_a_gate_that_keeps_the_query_gives_the_legacy_figures(name: str) -> None:
    """The one figure the legacy code gives of its gate: held open, it is the static selector."""
    with np.load(GOLDEN / f"{name}.npz") as figures:
        golden = {key: torch.tensor(figures[key]) for key in figures}
    tensors = torch.load(GOLDEN / f"{name}.v3.pt", weights_only=True)["model_state_dict"]
    layers = sum(key.endswith("in_proj_weight") for key in tensors)
    shots = golden["labels"].shape[-1]
    gated = make_selector(
        golden["query_emb"].shape[-1],
        ModelConfig(selector="gated", num_layers=layers, max_shots=shots),
    ).eval()
    assert gated.load_state_dict(tensors, strict=False).missing_keys == [
        "query_update_gate.weight",
        "query_update_gate.bias",
    ]
    gated.state_dict()["query_update_gate.bias"].fill_(1e4)
    query, candidates = golden["query_emb"], golden["cand_emb"]
    log_probs = sequence_log_prob(gated, query, candidates, golden["labels"])
    _close(log_probs, golden["log_probs"])
    picks = greedy(gated, query, candidates, shots)
    _close(torch.from_numpy(picks.positions), golden["greedy"])


def _load(name: str) -> Selector:
    tensors = torch.load(GOLDEN / f"{name}.v3.pt", weights_only=True)["model_state_dict"]
    layers = sum(key.endswith("in_proj_weight") for key in tensors)
    dim = tensors["input_proj.weight"].shape[1]
    selector = make_selector(dim, ModelConfig(num_layers=layers))
    selector.load_state_dict(tensors, strict=True)
    return selector.eval()
