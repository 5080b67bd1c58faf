"""Dynamic sampling: which groups carry a gradient, and how many prompts to draw for those that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from redone.types import Group

MIN_ASSUMED_SHARE = 0.25  # bounds the oversampling after a round in which almost nothing was informative


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A partition of groups, each part in draw order."""

    kept: tuple[Group, ...]  # the first `wanted` informative groups
    surplus: tuple[Group, ...]  # informative groups beyond them
    uninformative: tuple[Group, ...]


def select_groups(groups: Sequence[Group], wanted: int, eps: float) -> Selection:
    """Informative = raw rewards (never shaped ones) spread by more than eps."""
    informative = [group for group in groups if group.informative(eps)]
    return Selection(
        kept=tuple(informative[:wanted]),
        surplus=tuple(informative[wanted:]),
        uninformative=tuple(group for group in groups if not group.informative(eps)),
    )


def refill_count(wanted: int, informative: int, drawn: int) -> int:
    """Prompts to draw next, after `drawn` prompts gave `informative` groups of the `wanted` ones.

    The missing groups divided by the share seen so far (at least MIN_ASSUMED_SHARE), at most `wanted`: a
    round lasts as long as its longest response, so a few surplus groups cost less than one more round.
    """
    missing = wanted - informative
    if missing <= 0:
        return 0
    if drawn == 0:
        return wanted
    return min(wanted, math.ceil(missing / max(informative / drawn, MIN_ASSUMED_SHARE)))
