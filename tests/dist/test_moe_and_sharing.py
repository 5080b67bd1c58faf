"""Routing replay, the balancing loss under prefix sharing, and changes that parity and self-check notice."""

from __future__ import annotations

import pytest
from cases import marks
from ranks import Group
from test_trainer import GRADIENT, PARITY, WEIGHT


def at(cases: dict[str, str]) -> list[object]:
    """(ranks, name) of every test."""
    return [pytest.param(ranks, name, id=name, marks=marks(ranks)) for name, ranks in cases.items()]


@pytest.mark.parametrize(
    ("group", "name"),
    at(
        {"replay": "1", "replay PP2xVPP2xEP2": "4_long", "replay TP2xEP2": "4"}
        | {"replay CP2xEP2": "2_slow", "replay CP2xTP2xEP4": "4_slow"}
    ),
    indirect=["group"],
)
def test_recorded_routes_are_repeated(group: Group, name: str) -> None:
    """The same weights: bit-equal; where rows are padded, the padding's choices are not repeated and experts
    multiply other numbers of rows. Another router: other choices without replay, and replay keeps the old."""
    result = group[name]
    assert result["same"] <= (0.0 if name == "replay" else 2e-6)
    assert result["moved"] > 1e-2 and result["free_to_kept"] > 1e-2
    assert result["prompt_rows"] == 20


@pytest.mark.parametrize(
    ("group", "name"),
    at({"routed TP2xEP2": "4_long", "routed PP2xVPP2xEP2": "4_long", "routed CP2xTP2xEP4": "4_slow"}),
    indirect=["group"],
)
def test_given_routes_give_the_same_gradients_however_cut(group: Group, name: str) -> None:
    """Shared prompts in small micro-batches (recomputed, interleaved) against plain sequences in one."""
    result = group[name]
    assert result["loss"] <= 1e-6 and result["worst"] <= GRADIENT, result["name"]
    assert result["free"] > 1e-4  # the given routes are not those that the router would choose


@pytest.mark.parametrize(
    ("group", "name"),
    at({"balanced": "1", "balanced TP2xETP2": "2", "balanced CP2": "2_slow"}),
    indirect=["group"],
)
def test_the_balancing_loss_counts_tokens_by_multiplicity(group: Group, name: str) -> None:
    result = group[name]
    assert result["counts"] and result["aux"] <= 1e-5 and result["aux_value"] > 0.5
    assert result["worst"] <= GRADIENT, result["name"]
    assert result["without"] > 100 * GRADIENT  # the loss does move the gradients


def test_supervised_conversations_share_what_they_begin_with(world1: Group) -> None:
    result = world1["supervised"]
    assert result["tokens"] == [9 + 6 + 6 * 6, 3 * (15 + 12)]
    assert result["loss"] > 1 and result["difference"] <= 1e-6
    assert result["worst"] <= GRADIENT, result["name"]


def test_without_multiplicity_the_balancing_loss_is_wrong(world1: Group) -> None:
    result = world1["balanced wrongly"]
    assert not result["counts"] and result["worst"] > 100 * GRADIENT


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=marks("2_slow")) for name in ("sequence loss CP2", "balancing loss CP2")],
)
def test_context_ranks_and_tensor_ranks_make_the_same_gradients(world2_slow: Group, case: str) -> None:
    result = world2_slow[case]
    assert abs(result["loss"]) > 1e-4 and result["difference"] <= 1e-6 and result["metrics"] <= 1e-5
    assert result["worst"] <= GRADIENT, result["name"]


@pytest.mark.parametrize("what", ["sibling", "row", "position"])
def test_a_planted_error_fails_parity_and_the_self_check(world1: Group, what: str) -> None:
    found = world1["controls"]
    assert found["good"] <= PARITY and found["check good"] == "not refused"
    assert found[what] > 1000 * PARITY
    assert "prefix sharing changes log-probabilities" in found[f"check {what}"]


@pytest.mark.parametrize(
    ("group", "name"), at({"metrics TP2xEP2": "4", "metrics CP2xTP2xEP4": "4_slow"}), indirect=["group"]
)
def test_metrics_of_sharing_and_expert_load(group: Group, name: str) -> None:
    found = group[name]
    assert found["prefix/token_ratio"] > 1.2
    assert found["moe/load_max_layer"] >= found["moe/load_max"] > 1
    assert 0 <= found["moe/idle_experts"] < 1


@pytest.mark.parametrize(
    ("group", "name"),
    at({"asynchronous checkpoint": "1", "asynchronous checkpoint TP2xEP2": "4_long"}),
    indirect=["group"],
)
def test_an_asynchronous_checkpoint_holds_the_state_of_its_save(group: Group, name: str) -> None:
    """A step taken while it was written does not reach it."""
    assert group[name]["loss"] <= 1e-5 and group[name]["weights"] <= WEIGHT
