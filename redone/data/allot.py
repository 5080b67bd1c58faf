"""How many rows of which task: shares of domains, a temperature over sizes, caps and floors."""

from __future__ import annotations

from collections.abc import Mapping


def allot(
    sizes: Mapping[str, int],
    total: int | None,
    *,
    weights: Mapping[str, float],
    caps: Mapping[str, int],
    floor: int = 0,
    temperature: float = 1.0,
) -> dict[str, int]:
    """task -> rows, at most min(size, cap) each, adding up to `total` where the tasks allow it.

    A task's weight is weights[task] * size^(1/temperature). What a full task cannot take goes to the others
    in proportion (water filling); whole rows by largest remainder, ties by name. total None: all that caps
    allow.
    """
    limit = {t: min(n, caps.get(t, n)) for t, n in sizes.items()}
    if total is None or total >= sum(limit.values()):
        return limit
    given = {t: float(min(floor, limit[t])) for t in sizes}
    if sum(given.values()) > total:
        return _rounded({t: v * total / sum(given.values()) for t, v in given.items()}, total, limit)
    weight = {t: weights.get(t, 1.0) * sizes[t] ** (1.0 / temperature) for t in sizes if sizes[t]}
    open_tasks = {t for t in weight if given[t] < limit[t]}
    while open_tasks:
        rest = total - sum(given[t] for t in given if t not in open_tasks)
        scale = rest / sum(weight[t] for t in open_tasks)
        wished = {t: weight[t] * scale for t in open_tasks}
        low = {t: min(floor, limit[t]) for t in open_tasks}
        over = {t for t in open_tasks if wished[t] > limit[t]}
        under = {t for t in open_tasks if wished[t] < low[t]}
        excess = sum(wished[t] - limit[t] for t in over)
        lack = sum(low[t] - wished[t] for t in under)
        if not over and not under:
            given |= wished
            break
        # The larger violation is fixed first: it decides which way the others move.
        fixed = over if excess >= lack else under
        for t in fixed:
            given[t] = float(limit[t] if fixed is over else low[t])
        open_tasks -= fixed
    return _rounded(given, total, limit)


def _rounded(wished: Mapping[str, float], total: int, limit: Mapping[str, int]) -> dict[str, int]:
    """Largest remainder, never above the limit."""
    found = {t: min(int(v), limit[t]) for t, v in wished.items()}
    order = sorted(wished, key=lambda t: (-(wished[t] - int(wished[t])), t))
    missing = total - sum(found.values())
    while missing > 0:
        open_tasks = [t for t in order if found[t] < limit[t]]
        if not open_tasks:
            break
        for t in open_tasks[:missing]:
            found[t] += 1
        missing = total - sum(found.values())
    return found
