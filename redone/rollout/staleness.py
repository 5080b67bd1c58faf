"""How old the weights are that a batch's tokens were sampled under."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from redone.types import Group

UNKNOWN = -(2**31)


def oldest_version(group: Group) -> int:
    """Of any token of the group; a response whose versions are not known counts as older than all."""
    return min(
        min((span.version for span in rollout.completion.versions), default=UNKNOWN)
        for rollout in group.rollouts
    )


def staleness_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Over the tokens of `groups`, to be trained on by a trainer that holds `version`.

    staleness/mean and max: versions behind; staleness/behind_<d>: share of tokens that are d behind;
    staleness/mixed_share: of the responses, those that an update of the weights found unfinished.
    """
    tokens: Counter[int] = Counter()
    mixed = responses = 0
    for group in groups:
        for rollout in group.rollouts:
            spans = [span for span in rollout.completion.versions if span.end > span.start]
            responses += 1
            mixed += len({span.version for span in spans}) > 1
            for span in spans:
                tokens[version - span.version] += span.end - span.start
    if not tokens:
        return {}
    total = tokens.total()
    metrics = {
        "staleness/mean": sum(behind * n for behind, n in tokens.items()) / total,
        "staleness/max": float(max(tokens)),
        "staleness/mixed_share": mixed / responses,
    }
    return metrics | {f"staleness/behind_{behind}": n / total for behind, n in sorted(tokens.items())}
