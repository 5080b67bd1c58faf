"""Fill the micro-batches of a step: token budget, equal number per rank, equal cost. Arithmetic on lengths.

A unit is what may share one prompt: a group, or one sample where sharing is off or does not pay. A bin is one
micro-batch: parts of units, each costing its prompt once. A unit is split only where the budget, an equal
number of micro-batches or an idle rank asks for it, because every further part repeats the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np

from redone.data.stock import Stock, lower_bound

SHARING_PAYS = 1.02  # predicted cost without / with sharing from which a group shares its prompt
EVEN = 1.01  # max / mean cost of the micro-batches that run together, below which nothing is moved
GAIN = 0.005  # share of the mean cost that a move must save
MOVES = 4  # tries to even out a slot, per rank
ATTEMPTS = 8  # to fill a number of bins
MANY = 20_000  # units from which one attempt must do, with more bins instead of others
STEPS = 500_000  # of search in one attempt, about
CANDIDATES = 16  # units looked at for a part that fills a gap
FIRST = (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Cost of work in units of one token's matrix products (see layout.token_costs)."""

    row: float = 0.0  # of a token that is projected to the vocabulary
    pair: float = 1.0 / 8192  # of a query that sees one key

    def prompt(self, prompt: Any) -> Any:
        """Of a prompt of so many tokens (a number or an array)."""
        return prompt + self.pair * prompt * prompt / 2

    def response(self, prompt: Any, length: Any) -> Any:
        """Of a response that follows a prompt (numbers or arrays), without the prompt."""
        return length * (1.0 + self.row + self.pair * (prompt + length / 2))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Units:
    """Columns, one row per unit: samples[u] of group[u] may share a copy of their prompt."""

    group: list[int]
    samples: list[tuple[int, ...]]
    prompt: list[int]  # tokens
    lengths: list[tuple[int, ...]]  # tokens of each sample
    tokens: list[int]  # of the whole unit
    cost: list[float]


@dataclass(slots=True, eq=False)
class Bin:
    """One micro-batch. parts: unit -> positions in its `samples`."""

    parts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tokens: int = 0
    cost: float = 0.0


def make_units(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], sharing: bool, cost: Cost
) -> Units:
    """prompts[g] and responses[g][i] in tokens; one unit per group if that saves SHARING_PAYS."""
    counts = np.array([len(r) for r in responses])
    prompt = np.repeat(np.array(prompts), counts)
    lengths = np.fromiter((n for r in responses for n in r), np.int64, int(counts.sum()))
    own = cost.response(prompt, lengths)
    once = cost.prompt(np.array(prompts))
    total = np.bincount(np.repeat(np.arange(len(counts)), counts), own, len(counts))
    shared = (counts > 1) & (counts * once + total >= SHARING_PAYS * (once + total)) & sharing
    alone = (own + cost.prompt(prompt)).tolist()
    units = Units(group=[], samples=[], prompt=[], lengths=[], tokens=[], cost=[])
    first = 0
    for g, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        if shared[g]:
            units.group.append(g)
            units.samples.append(tuple(range(len(r))))
            units.prompt.append(p)
            units.lengths.append(tuple(r))
            units.tokens.append(p + sum(r))
            units.cost.append(float(once[g] + total[g]))
        else:
            units.group.extend([g] * len(r))
            units.samples.extend((i,) for i in range(len(r)))
            units.prompt.extend([p] * len(r))
            units.lengths.extend((n,) for n in r)
            units.tokens.extend(p + n for n in r)
            units.cost.extend(alone[first : first + len(r)])
        first += len(r)
    return units


class Filling:
    """Bins of one step under construction."""

    def __init__(self, units: Units, count: int, cap: int, cost: Cost) -> None:
        self.units, self.cap, self.cost = units, cap, cost
        self.bins = [Bin() for _ in range(count)]

    def put_whole(self, b: Bin, u: int) -> None:
        samples = self.units.samples[u]
        b.parts[u] = FIRST if len(samples) == 1 else tuple(range(len(samples)))
        b.tokens += self.units.tokens[u]
        b.cost += self.units.cost[u]

    def put(self, b: Bin, u: int, positions: tuple[int, ...]) -> None:
        tokens, cost = self._work(u, positions)
        if u not in b.parts:
            tokens += self.units.prompt[u]
            cost += self.cost.prompt(self.units.prompt[u])
        b.parts[u] = b.parts.get(u, ()) + positions
        b.tokens += tokens
        b.cost += cost

    def take(self, b: Bin, u: int, positions: tuple[int, ...]) -> None:
        tokens, cost = self._work(u, positions)
        b.parts[u] = tuple(k for k in b.parts[u] if k not in positions)
        if not b.parts[u]:
            del b.parts[u]
            tokens += self.units.prompt[u]
            cost += self.cost.prompt(self.units.prompt[u])
        b.tokens -= tokens
        b.cost -= cost

    def _work(self, u: int, positions: Iterable[int]) -> tuple[int, float]:
        """(tokens, cost) of some responses of a unit, without the prompt."""
        prompt, lengths = self.units.prompt[u], [self.units.lengths[u][k] for k in positions]
        return sum(lengths), sum(self.cost.response(prompt, n) for n in lengths)

    def place(self, first: Mapping[int, int], tight: bool, more: int = 0) -> set[int]:
        """Fill one bin after the other to the mean of what is left; returns the sizes that stood in the way,
        none when everything has its place.

        A bin begins with the largest unit, but sizes in `first` go before the others, the higher the earlier.
        Then come units that bring it to the mean. `tight`: up to the budget, the last gap by a part of one.
        `more`: bins to open whenever there are too few.
        """
        self.stock, self.left = Stock(self.units.tokens), dict[int, tuple[int, ...]]()
        units, steps = self.units, min(500, max(20, STEPS // len(self.units.group)))
        several = (u for u, lengths in enumerate(units.lengths) if len(lengths) > 1)
        self.divisible = dict.fromkeys(sorted(several, key=units.prompt.__getitem__))
        order = sorted(first, key=lambda size: (first[size], size))
        hard = set[int]()
        at = 0
        while self.stock.total:
            if at == len(self.bins):
                self.bins += [Bin() for _ in range(more)]
            bins = len(self.bins) - at
            if not more and self.stock.total > bins * self.cap:
                break
            b, low = self.bins[at], min(self.cap, -(-self.stock.total // bins))
            at += 1
            high = self.cap if tight else min(self.cap, int(EVEN * low))
            while order and order[-1] not in self.stock.units:
                order.pop()
            size = order[-1] if order else self.stock.sizes[-1]
            self._put_rest(b, size) if size <= self.cap else self._put_part(b, self.stock.units[size][-1])
            if b.tokens < low:
                sizes = self.stock.subset(low - b.tokens, high - b.tokens, steps)
                for size in sizes:
                    self._put_rest(b, size)
                while tight and b.tokens < low and self._fill_gap(b):
                    pass
                if b.tokens < low:
                    hard.update(units.tokens[u] for u in b.parts)
        return hard.union(self.stock.sizes) if self.stock.total else set()

    def _put_rest(self, b: Bin, size: int) -> None:
        """What is left of a unit of that size."""
        u = self.stock.remove(size)
        self.divisible.pop(u, None)
        if u in self.left:
            self.put(b, u, self.left.pop(u))
        else:
            self.put_whole(b, u)

    def _put_part(self, b: Bin, u: int) -> None:
        """As much of a unit as fits; the rest goes back."""
        prompt, lengths = self.units.prompt[u], self.units.lengths[u]
        positions = self.left.get(u, range(len(lengths)))
        some, others = self._share(u, positions, self.cap - b.tokens)
        self.stock.remove(prompt + sum(lengths[k] for k in positions), u)
        self.put(b, u, some)
        if others:
            self.left[u] = others
            self.stock.add(prompt + sum(lengths[k] for k in others), u)
        else:
            self.divisible.pop(u)
            self.left.pop(u, None)

    def _fill_gap(self, b: Bin) -> bool:
        """A part of the unit that fills the gap best; of those with short prompts, for a part repeats it."""
        best, found = 0, None
        for u in islice(self.divisible, CANDIDATES):
            positions = self.left.get(u, range(len(self.units.lengths[u])))
            some, _ = self._share(u, positions, self.cap - b.tokens)
            tokens = sum(self.units.lengths[u][k] for k in some)
            if tokens > best:
                best, found = tokens, u
        if found is not None:
            self._put_part(b, found)
        return found is not None

    def _share(self, u: int, positions: Sequence[int], room: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(those that fit into `room` beside the prompt, longest first, the others)."""
        lengths = self.units.lengths[u]
        room -= self.units.prompt[u]
        inside, outside = [], []
        for k in sorted(positions, key=lambda k: -lengths[k]):
            if lengths[k] <= room:
                room -= lengths[k]
                inside.append(k)
            else:
                outside.append(k)
        return tuple(inside), tuple(outside)

    def even_out(self, slot: Sequence[Bin]) -> None:
        """Move parts from the costliest to the cheapest bin of a slot while that lowers the maximum."""
        mean = sum(b.cost for b in slot) / len(slot)
        for _ in range(MOVES * len(slot)):
            high = max(slot, key=lambda b: b.cost)
            if high.cost <= EVEN * mean or not self._move(high, min(slot, key=lambda b: b.cost), mean):
                return

    def _move(self, high: Bin, low: Bin, mean: float) -> bool:
        """The one move that makes the larger of the two least; False when none helps by 0.5% of the mean."""
        best: tuple[float, int, tuple[int, ...]] | None = None
        for u, positions in high.parts.items():
            prompt = self.units.prompt[u]
            once = self.cost.prompt(prompt)
            fixed = 0.0 if u in low.parts else once
            room = self.cap - low.tokens - (0 if u in low.parts else prompt)
            chosen = self._transfer(u, positions, room, (high.cost - low.cost - fixed) / 2)
            for some in (chosen, positions):
                tokens, moved = self._work(u, some)
                if not some or tokens > room:
                    continue
                left = high.cost - moved - (once if len(some) == len(positions) else 0.0)
                worst = max(left, low.cost + moved + fixed)
                if best is None or worst < best[0]:
                    best = (worst, u, some)
        if best is None or best[0] > high.cost - GAIN * mean:
            return False
        self.take(high, best[1], best[2])
        self.put(low, best[1], best[2])
        return True

    def _transfer(self, u: int, positions: Sequence[int], room: int, target: float) -> tuple[int, ...]:
        """Samples of about `target` cost that fit into `room` tokens, not all of them."""
        prompt, lengths = self.units.prompt[u], self.units.lengths[u]
        chosen: list[int] = []
        for k in sorted(positions, key=lambda k: -lengths[k]):
            value = self.cost.response(prompt, lengths[k])
            if value <= target and lengths[k] <= room and len(chosen) + 1 < len(positions):
                chosen.append(k)
                target -= value
                room -= lengths[k]
        return tuple(chosen)


def fill(units: Units, dp: int, cap: int, cost: Cost) -> list[list[Bin]]:
    """slots[m][d]: bins of at most `cap` tokens, the fewest slots that the search finds.

    Bins of a slot have nearly equal cost, and so have the ranks' totals. Every unit must fit a bin by one
    sample at least: prompt + longest response <= cap.
    """
    filling = _fewest_bins(units, dp, cap, cost)
    bins = sorted(filling.bins, key=lambda b: -b.cost)
    totals = [0.0] * dp
    result = []
    for m in range(0, len(bins), dp):
        slot = bins[m : m + dp]
        filling.even_out(slot)
        slot.sort(key=lambda b: -b.cost)
        placed: list[Bin] = [slot[0]] * dp
        for b, d in zip(slot, sorted(range(dp), key=lambda d: (totals[d], d)), strict=True):
            placed[d] = b
            totals[d] += b.cost
        result.append(placed)
    return result


def _fewest_bins(units: Units, dp: int, cap: int, cost: Cost) -> Filling:
    """A multiple of dp bins that hold all units; evenly filled ones where that takes no more.

    An attempt that fails tells which sizes are hard to place; the next one begins with them.
    """
    least = _least_bins(units, cap)
    many = len(units.group) > MANY
    for slots in count(max(1, -(-least // dp))):
        full = sum(units.tokens) * EVEN > slots * dp * cap
        first = Counter[int]()
        for attempt in range(ATTEMPTS):
            tight = full or attempt > 0
            filling = Filling(units, slots * dp, cap, cost)
            hard = filling.place(first, tight, dp if tight and many else 0)
            if not hard:
                return filling
            if tight:
                first.update(hard)
    raise AssertionError


def _least_bins(units: Units, cap: int) -> int:
    if max(map(len, units.lengths), default=0) <= 1:
        return lower_bound(units.tokens, cap)
    again = sum(
        p * ((n - p - 1) // max(1, cap - p))
        for p, n in zip(units.prompt, units.tokens, strict=True)
        if n > cap
    )
    return -(-(sum(units.tokens) + again) // cap)
