"""Units that wait for a bin, by size: which of them fill a gap best, and how many bins they need at least."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np

LARGEST_K = 12  # of the functions that lower_bound tries


def lower_bound(sizes: Sequence[int], cap: int) -> int:
    """Bins that any packing of indivisible `sizes` needs.

    The best of the dual feasible functions u(k) after U(epsilon) of Fekete and Schepers (Math. Program. 91,
    2001) for k <= LARGEST_K and every epsilon; never below the plain quotient nor Martello and Toth's L2.
    """
    ordered = np.sort(np.asarray(sizes, dtype=np.int64))
    small = np.unique(np.append(ordered[ordered <= cap // 2], 0))  # epsilon: smaller sizes count nothing,
    first = np.searchsorted(ordered, small)
    last = np.searchsorted(ordered, cap - small, side="right")  # and ordered[last:] a full bin each
    best = 0
    for k in range(LARGEST_K + 1):
        steps = (k + 1) * ordered
        weight = np.where(steps % cap == 0, k * ordered, steps // cap * cap) if k else ordered
        full = max(1, k) * cap  # weight of a full bin
        total = np.append(0, np.cumsum(weight))
        most = ((len(ordered) - last) * full + total[last] - total[first]).max()
        best = max(best, -(-int(most) // full))
    return best


class Stock:
    """Units of the same size are interchangeable."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.total = sum(sizes)
        self.units: dict[int, list[int]] = {}
        for u, size in enumerate(sizes):
            self.units.setdefault(size, []).append(u)
        self.sizes = sorted(self.units)

    def add(self, size: int, u: int) -> None:
        if size not in self.units:
            insort(self.sizes, size)
        self.units.setdefault(size, []).append(u)
        self.total += size

    def remove(self, size: int, u: int | None = None) -> int:
        """This unit, or any of that size."""
        same = self.units[size]
        found = same.pop() if u is None else same.pop(same.index(u))
        if not same:
            del self.units[size], self.sizes[bisect_left(self.sizes, size)]
        self.total -= size
        return found

    def subset(self, low: int, high: int, steps: int) -> list[int]:
        """Sizes, descending, that add up to something in [low, high]; after `steps` tries without one, those
        with the largest sum below. Depth first, larger sizes first."""
        sizes, units = self.sizes, self.units
        best, found = 0, list[int]()
        total, chosen, used = 0, list[int](), dict[int, int]()  # indices of sizes; how often each
        at = len(sizes) - 1
        while True:
            at = min(at, bisect_right(sizes, high - total) - 1)
            if at >= 0 and total < low:
                if used.get(at, 0) == len(units[sizes[at]]):
                    at -= 1
                    continue
                chosen.append(at)
                used[at] = used.get(at, 0) + 1
                total += sizes[at]
                continue
            if total > best:
                best, found = total, [sizes[i] for i in chosen]
            steps -= 1
            if best >= low or steps <= 0 or not chosen:
                return found
            at = chosen.pop()
            used[at] -= 1
            total -= sizes[at]
            # A smaller size in its place is of use only with one more behind it.
            at = min(at, bisect_right(sizes, high - total - sizes[0])) - 1
