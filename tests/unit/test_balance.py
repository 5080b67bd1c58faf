"""Filling of micro-batches: what holds for any lengths, and how good it is for realistic ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redone.data import balance
from redone.data.balance import Bin, Cost, Filling, fill, make_units
from redone.data.stock import Stock, lower_bound

CAP = 64
COST = Cost(row=0.1, pair=1e-2)
groups = st.lists(
    st.tuples(st.integers(1, 24), st.lists(st.integers(1, 40), min_size=1, max_size=9)),
    min_size=1,
    max_size=25,
)


def content(units, b: Bin) -> tuple[int, float]:
    """(tokens, cost) of a bin, counted again from its parts."""
    tokens, cost = 0, 0.0
    for u, positions in b.parts.items():
        prompt, lengths = units.prompt[u], [units.lengths[u][k] for k in positions]
        tokens += prompt + sum(lengths)
        pairs = prompt * prompt / 2 + sum(prompt * n + n * n / 2 for n in lengths)
        cost += prompt + 1.1 * sum(lengths) + 1e-2 * pairs
    return tokens, cost


@settings(max_examples=60, deadline=None)
@given(groups=groups, dp=st.integers(1, 5), sharing=st.booleans())
def test_any_lengths_are_placed_once_within_the_budget(groups, dp, sharing) -> None:
    units = make_units([p for p, _ in groups], [r for _, r in groups], sharing, COST)
    slots = fill(units, dp, CAP, COST)
    assert all(len(slot) == dp for slot in slots)
    placed = Counter(
        (units.group[u], units.samples[u][k])
        for slot in slots
        for b in slot
        for u, positions in b.parts.items()
        for k in positions
    )
    assert placed == {(g, i): 1 for g, (_, r) in enumerate(groups) for i in range(len(r))}
    for slot in slots:
        for b in slot:
            tokens, cost = content(units, b)
            assert b.tokens == tokens <= CAP
            assert b.cost == pytest.approx(cost)
            assert all(b.parts.values())


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, CAP), min_size=1, max_size=9))
def test_lower_bound_is_one(sizes) -> None:
    """Never above the least number of bins, found by search; never below the plain quotient."""
    assert -(-sum(sizes) // CAP) <= lower_bound(sizes, CAP) <= fewest(sorted(sizes, reverse=True), [])


def fewest(sizes: list[int], bins: list[int]) -> int:
    if not sizes:
        return len(bins)
    found = fewest(sizes[1:], [*bins, CAP - sizes[0]])
    for room in {r for r in bins if r >= sizes[0]}:
        others = bins.copy()
        others[others.index(room)] = room - sizes[0]
        found = min(found, fewest(sizes[1:], others))
    return found


def test_lower_bound_counts_large_items() -> None:
    assert lower_bound([33] * 7, CAP) == 7
    assert lower_bound([40] * 3 + [30] * 4, CAP) == 5  # 30 does not fit beside 40
    assert lower_bound([22] * 8, CAP) == 4  # two each, though the sum would fit three bins


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    high=st.integers(1, 90),
    slack=st.integers(0, 5),
)
def test_a_subset_in_the_window_is_found_if_there_is_one(sizes, high, slack) -> None:
    sums = {0}
    for size in sizes:
        sums |= {s + size for s in sums}
    reachable = max(s for s in sums if s <= high)
    found = Stock(sizes).subset(high - slack, high, 10_000)
    assert not Counter(found) - Counter(sizes) and sum(found) <= high
    assert sum(found) >= high - slack or sum(found) == reachable < high - slack


def draw(seed: int, count: int, center: float, answer: float) -> list[tuple[int, list[int]]]:
    """Log-normal lengths within the paper's limits; 16 responses scattered around one length."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        prompt = int(np.clip(np.exp(rng.normal(np.log(center), 0.7)), 32, 10_000))
        middle = np.log(answer) + rng.normal(0, 0.7)
        result.append((prompt, np.clip(np.exp(rng.normal(middle, 0.4, 16)), 2, 8192).astype(int).tolist()))
    return result


@pytest.mark.parametrize("dp", [1, 8, 32])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize(("center", "answer"), [(1500, 40), (5000, 60), (1500, 400), (150, 3000)])
def test_quality_on_the_papers_limits(center: int, answer: int, sharing: bool, dp: int) -> None:
    cap, cost, wanted = 20_480, Cost(row=0.11, pair=1.4e-4), 9 * dp * 20_480
    per_group = (center if sharing else 16 * center) + 16 * answer
    shapes = draw(dp, int(wanted / per_group), center, answer)
    units = make_units([p for p, _ in shapes], [r for _, r in shapes], sharing, cost)
    slots = fill(units, dp, cap, cost)
    if sharing:
        total = sum(p * max(1, -(-sum(r) // (cap - p))) + sum(r) for p, r in shapes)
        least = -(-total // (cap * dp))
    else:
        least = -(-lower_bound([p + n for p, r in shapes for n in r], cap) // dp)
    assert len(slots) <= least + 1
    ranks = [sum(slot[d].cost for slot in slots) for d in range(dp)]
    assert len(slots) >= 8 and max(ranks) <= 1.05 * sum(ranks) / dp
    waiting = sum(max(b.cost for b in slot) for slot in slots)
    assert waiting <= 1.05 * sum(ranks) / dp


@pytest.mark.parametrize(("center", "answer"), [(1500, 40), (5000, 60), (1500, 400), (150, 3000)])
def test_unshared_steps_of_32_micro_batches_use_97_percent_of_the_budget(center: int, answer: int) -> None:
    dp, cap, cost, sizes, shapes = 8, 20_480, Cost(row=0.11, pair=1.4e-4), 0, []
    for p, r in draw(1, 500, center, answer):
        if sizes < 32.8 * dp * cap:
            shapes.append((p, r))
            sizes += 16 * p + sum(r)
    slots = fill(make_units([p for p, _ in shapes], [r for _, r in shapes], False, cost), dp, cap, cost)
    assert sizes >= 0.97 * len(slots) * dp * cap


@pytest.mark.parametrize("seed", [3, 7])
def test_hard_sizes_go_first_after_a_failure(seed: int) -> None:
    """Fourteen prompts: one attempt needs a bin more than the lower bound."""
    shapes = draw(seed, 14, 5000, 60)
    units = make_units([p for p, _ in shapes], [r for _, r in shapes], False, Cost())
    assert len(fill(units, 1, 20_480, Cost())) == lower_bound(units.tokens, 20_480)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_step_of_very_many_samples_opens_more_bins_instead_of_trying_again(sharing, monkeypatch) -> None:
    monkeypatch.setattr(balance, "MANY", 0)
    monkeypatch.setattr(balance, "_least_bins", lambda units, cap: 1)
    shapes = draw(3, 60, 5000, 60)
    units = make_units([p for p, _ in shapes], [r for _, r in shapes], sharing, COST)
    slots = fill(units, 4, 20_480, COST)
    parts = [(u, k) for slot in slots for b in slot for u, positions in b.parts.items() for k in positions]
    assert sorted(parts) == [(u, k) for u, lengths in enumerate(units.lengths) for k in range(len(lengths))]
    assert all(b.tokens <= 20_480 for slot in slots for b in slot)
    assert len(slots) <= -(-sum(units.tokens) // (4 * 20_480)) + 1


def test_a_group_is_split_only_where_it_must_be() -> None:
    units = make_units([100] * 12, [[5] * 8] * 12, True, Cost())
    slots = fill(units, 1, 700, Cost())
    assert sum(len(b.parts) for slot in slots for b in slot) == 12
    tight = fill(units, 1, 400, Cost())  # 2.86 whole groups fit a bin: filling it needs a split
    assert sum(len(b.parts) for slot in tight for b in slot) > 12
    assert len(tight) == 5


def test_sharing_stops_where_it_does_not_pay() -> None:
    """A prompt of 10 beside responses of 3,000 saves 0.3%: every sample stands alone."""
    assert len(make_units([10], [[3000] * 4], True, Cost()).group) == 4
    assert len(make_units([1000], [[30] * 4], True, Cost()).group) == 1
    assert len(make_units([1000], [[30] * 4], False, Cost()).group) == 4
    assert len(make_units([1000], [[30]], True, Cost()).group) == 1


def test_moving_work_keeps_the_books() -> None:
    units = make_units([30, 10], [[5, 6, 7, 8], [4]], True, COST)
    filling = Filling(units, 2, 1000, COST)
    high, low = filling.bins
    filling.put_whole(high, 0)
    filling.put_whole(high, 1)
    filling.even_out([high, low])
    for b in (high, low):
        tokens, cost = content(units, b)
        assert b.tokens == tokens and b.cost == pytest.approx(cost)
    assert max(high.cost, low.cost) < 0.75 * (high.cost + low.cost)
