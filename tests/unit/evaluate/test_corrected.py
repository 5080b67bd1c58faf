"""The corrected scorers: perfect answers are perfect, degenerate policies are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from redone.evaluate.corrected import CORRECTED, corrected, labels, set_f1
from redone.evaluate.suites_sns import RELEASED, reported

# degenerate policy -> (most it may earn when corrected)
DEGENERATE = {
    ("Note-CHLW", "always_empty-list"): 50.001,
    ("Note-MRC-complex", "always_empty-list"): 50.001,
    ("Note-CHLW", "all_candidates"): 50.5,  # a gold that is not [] is every candidate of its note
    ("Note-Hashtag-multiple", "all_candidates"): 1.0,
    ("Note-Hashtag-single", "all_candidates"): 0.5,
    ("Note-Taxonomy-single", "all_candidates"): 0.5,
    ("Note-QueryCorr-topic", "all_levels"): 0.0,
    ("Note-NER", "copy_everything"): 1.0,
}


def predictions(data: Path, file: str, policy: str) -> list[str]:
    with gzip.open(data / "sns-bench-golden" / f"{file}__{policy}.json.gz", "rt", encoding="utf-8") as stream:
        found = json.load(stream)["predictions"]
    assert isinstance(found, list)
    return found


def rows_of(data: Path, file: str) -> list[dict[str, str]]:
    found = json.loads((data / "sns-bench" / f"{file}.json").read_text(encoding="utf-8"))
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("file", sorted(CORRECTED))
def test_gold_is_perfect_and_empty_is_not(redone_data: Path, file: str) -> None:
    rows = rows_of(redone_data, file)
    assert corrected(file, predictions(redone_data, file, "gold"), rows)["corrected"] == pytest.approx(100)
    assert corrected(file, [""] * len(rows), rows)["corrected"] < 1


@pytest.mark.parametrize(("file", "policy"), sorted(DEGENERATE))
def test_degenerate_policies(redone_data: Path, file: str, policy: str) -> None:
    rows, texts = rows_of(redone_data, file), predictions(redone_data, file, policy)
    found = corrected(file, texts, rows)
    assert found.get("corrected-balanced", found["corrected"]) <= DEGENERATE[file, policy], found


def test_the_released_score_of_a_constant_is_high_and_the_balanced_one_is_not(redone_data: Path) -> None:
    rows, texts = (
        rows_of(redone_data, "Note-CHLW"),
        predictions(redone_data, "Note-CHLW", "always_empty-list"),
    )
    old = reported("Note-CHLW", RELEASED["Note-CHLW"][1](texts, rows))
    assert old == pytest.approx(67.64, abs=0.01)
    assert corrected("Note-CHLW", texts, rows)["corrected-balanced"] == pytest.approx(50)


def test_a_name_of_the_scorer_is_a_wrong_answer_not_a_leak(redone_data: Path) -> None:
    """The released scorer evaluates outputs as program text: `reference` there is the gold list itself."""
    rows = rows_of(redone_data, "Note-CHLW")
    for text in ("reference", "__import__('os').getpid()", "[reference]"):
        assert RELEASED["Note-CHLW"][1]([text] * len(rows), rows)["success-f1"] == 0
        assert corrected("Note-CHLW", [text] * len(rows), rows)["corrected"] == 0


def test_sets_of_labels() -> None:
    assert set_f1(["a", "a"], {"a"}) == 1 and set_f1(["a", "b"], {"a"}) == pytest.approx(2 / 3)
    assert set_f1(["a", "b", "c"], {"a"}) == 0
    row = {"answer": "a, b", "candidates": "a, b, c"}
    assert labels("b,a", row) == 1 and labels("a, b, c", row) == 0 and labels("a, c", row) == 0.5
