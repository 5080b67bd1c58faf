"""Fill the micro-batches of a step: token budget, equal number per rank, equal cost. Arithmetic on lengths.

A unit is what may share one prompt: a group, or one sample where sharing is off or does not pay. A bin is one
micro-batch: parts of units, each costing its prompt once. A unit is split only where the budget, an equal
number of micro-batches or an idle rank asks for it, because every further part repeats the prompt.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARING_PAYS = 1.1  # predicted cost without / with sharing from which a group shares its prompt
EVEN = 1.01  # max / mean cost of the micro-batches that run together, below which nothing is moved
GAIN = 0.005  # share of the mean cost that a move must save
MOVES = 4  # tries to even out a slot, per rank
COMPLETED = 5000  # units up to which bins are completed one by one (quadratic time)
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


def lower_bound(sizes: Sequence[int], cap: int) -> int:
    """Bins that any packing of indivisible `sizes` needs (Martello and Toth's L2)."""
    ordered = sorted(sizes)
    sums = [0]
    for size in ordered:
        sums.append(sums[-1] + size)
    half = bisect_left(ordered, cap / 2 + 0.5)  # sizes[half:] are larger than half the cap
    best = -(-sums[-1] // cap)
    for i in range(half + 1):
        small = ordered[i] if i < len(ordered) else cap // 2
        if small > cap // 2:
            small = cap // 2
        alone = bisect_left(ordered, cap - small + 1)  # sizes[alone:] cannot stand beside `small`
        middle = sums[alone] - sums[half]
        room = (alone - half) * cap - middle
        rest = sums[half] - sums[i] - room
        best = max(best, len(ordered) - half + max(0, -(-rest // cap)))
    return best


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

    def spread(self, order: Sequence[int]) -> bool:
        """Largest unit first into the emptiest bin; False when one does not fit."""
        heap = [(0, i) for i in range(len(self.bins))]
        for u in order:
            tokens, i = heap[0]
            size = self.units.tokens[u]
            if tokens + size > self.cap:
                return False
            self.put_whole(self.bins[i], u)
            heapq.heapreplace(heap, (tokens + size, i))
        return True

    def squeeze(self, order: Sequence[int], step: int) -> None:
        """Largest unit first into the fullest bin with room; a unit without one is split over several.

        Opens `step` more bins whenever nothing fits.
        """
        free = [(self.cap, i) for i in range(len(self.bins))]  # ascending
        queue = [(-self.units.tokens[u], u, tuple(range(len(self.units.samples[u])))) for u in order]
        heapq.heapify(queue)
        while queue:
            negative, u, positions = heapq.heappop(queue)
            at = bisect_left(free, (-negative, -1))
            rest: tuple[int, ...] = ()
            if at == len(free):
                at -= 1
                some, rest = self._share(u, positions, free[at][0])
                if some:
                    positions = some
                else:
                    free += [(self.cap, len(self.bins) + k) for k in range(step)]
                    self.bins += [Bin() for _ in range(step)]
                    heapq.heappush(queue, (negative, u, positions))
                    continue
            room, i = free.pop(at)
            before = self.bins[i].tokens
            self.put(self.bins[i], u, positions)
            insort(free, (room - (self.bins[i].tokens - before), i))
            if rest:
                heapq.heappush(queue, (-self.units.prompt[u] - self._work(u, rest)[0], u, rest))

    def complete(self, order: Sequence[int]) -> bool:
        """One bin after the other: the largest unit left, then the largest that fit, and for the last places
        the pair that fills best. False when units are left over."""
        left = [(self.units.tokens[u], u) for u in reversed(order)]  # ascending
        for b in self.bins:
            room = self.cap
            while left and left[0][0] <= room:
                at = bisect_left(left, (room + 1, -1)) - 1
                pair = _best_pair(left, room) if room < min(self.cap, 3 * left[0][0]) else None
                if pair is not None and left[pair[0]][0] + left[pair[1]][0] > left[at][0]:
                    at = pair[1]
                size, u = left.pop(at)
                self.put_whole(b, u)
                room -= size
        return not left

    def _share(
        self, u: int, positions: tuple[int, ...], room: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def _best_pair(left: Sequence[tuple[int, int]], room: int) -> tuple[int, int] | None:
    """Indices i < j of the ascending sizes whose sum is largest within `room`."""
    i, j, best, found = 0, bisect_left(left, (room + 1, -1)) - 1, 0, None
    while i < j:
        total = left[i][0] + left[j][0]
        if total > room:
            j -= 1
            continue
        if total > best:
            best, found = total, (i, j)
        i += 1
    return found


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
    """A multiple of dp bins that hold all units; evenly filled ones where that takes no more."""
    sizes = units.tokens
    order = sorted(range(len(sizes)), key=lambda u: (-sizes[u], u))
    slots = max(1, -(-sum(sizes) // (cap * dp)))
    if (even := Filling(units, slots * dp, cap, cost)).spread(order):
        return even
    tight = Filling(units, slots * dp, cap, cost)
    tight.squeeze(order, dp)
    if len(tight.bins) > slots * dp and len(units.group) <= COMPLETED:
        completed = Filling(units, slots * dp, cap, cost)
        if completed.complete(order):
            return completed
    if (even := Filling(units, len(tight.bins), cap, cost)).spread(order):
        return even
    return tight
