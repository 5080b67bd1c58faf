"""A reward that anything can learn: the share of characters that are the wanted letter (nothing earns 0)."""

from typing import Any

TARGET = "a"


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None
) -> float:
    """In [0, 1]. `ground_truth` names the letter when it is one; else TARGET is wanted."""
    wanted = ground_truth if isinstance(ground_truth, str) and len(ground_truth) == 1 else TARGET
    return solution_str.count(wanted) / len(solution_str) if solution_str else 0.0
