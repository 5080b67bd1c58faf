"""SNS-Bench's files as sums per item (see measures.py): the same numbers as released.py and corrected.py give
for a list, in a form that can be resampled. tests/unit/evaluate holds them equal on the golden lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redone.errors import ConfigError
from redone.evaluate import corrected, released, released_mrc
from redone.evaluate.released import CUT, CUT_END, LEVELS, TINY
from redone.evaluate.suites_sns import RELEASED

Row = Mapping[str, Any]
Cosine = Callable[[str, str], float]
Tally = Callable[[str, Row], Sequence[float]]
Finish = Callable[[Sequence[float]], dict[str, float]]
PARTIAL = "half of the score: ANLS without the cosine; give --embedding PATH (bge-large-en-v1.5)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedFile:
    tally: Tally
    finish: Finish
    mean: bool = False
    partial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectedFile:
    tally: Tally
    finish: Finish


def make_released(file: str, cosine: Cosine | None = None) -> ReleasedFile:
    """Raises ConfigError for a name that is none of the twelve."""
    if file not in RELEASED:
        raise ConfigError(f"file={file}: no released SNS-Bench file; there are {', '.join(RELEASED)}")
    if file in ("Note-Taxonomy-single", "Note-Hashtag-single"):
        return _accuracy(lambda p, r: released.cut_label(p, CUT_END) == r["answer"])
    if file in ("Note-QueryCorr-explain", "Note-Gender"):
        return _accuracy(lambda p, r: released.cut_label(p, CUT) == r["answer"])
    if file == "Note-Taxonomy-multiple":
        return _accuracy(_same_path)
    if file in ("Note-Hashtag-multiple", "Note-NER"):
        return ReleasedFile(tally=_sets, finish=_micro_f1)
    if file == "Note-QueryGen":
        return _query(cosine)
    return {
        "Note-QueryCorr-topic": ReleasedFile(tally=_level, finish=_macro_f1),
        "Note-CHLW": ReleasedFile(tally=_highlight, finish=_success_f1),
        "Note-MRC-simple": ReleasedFile(tally=_simple, finish=_simple_mean),
        "Note-MRC-complex": ReleasedFile(tally=_complex, finish=_complex_mean),
    }[file]


def make_corrected(file: str) -> CorrectedFile:
    """Columns: value, items, value of empty golds, empty golds."""
    if file not in corrected.CORRECTED:
        raise ConfigError(f"file={file}: no corrected scorer; there are {', '.join(corrected.CORRECTED)}")
    score = corrected.CORRECTED[file]

    def tally(prediction: str, row: Row) -> Sequence[float]:
        value, empty = score(prediction, row), float(corrected.has_empty_gold(file, row))
        return value, 1.0, value * empty, empty

    def finish(sums: Sequence[float]) -> dict[str, float]:
        value, n, value_empty, empty = sums
        found = {"corrected": _percent(value, n)}
        if empty and empty < n:
            full = _percent(value - value_empty, n - empty)
            found["balanced"] = (_percent(value_empty, empty) + full) / 2
        return found

    return CorrectedFile(tally=tally, finish=finish)


def _accuracy(hit: Callable[[str, Row], bool]) -> ReleasedFile:
    return ReleasedFile(
        tally=lambda p, r: (float(hit(p, r)), 1.0),
        finish=lambda sums: {"accuracy": _percent(sums[0], sums[1])},
        mean=True,
    )


def _same_path(prediction: str, row: Row) -> bool:
    found = released.clean(released.cut_label(prediction, CUT_END))
    return found in (released.clean(row["answer"]), row["answer"])


def _sets(prediction: str, row: Row) -> Sequence[float]:
    found, gold = set(released.cut_list(prediction)), set(released.cut_list(row["answer"]))
    return len(found & gold), len(found), len(gold)


def _micro_f1(sums: Sequence[float]) -> dict[str, float]:
    hits, found, gold = sums
    return {"f1": round(hits * 2 / (found + gold + TINY), 4) * 100}


def _level(prediction: str, row: Row) -> Sequence[float]:
    """Per level: right, missed, claimed falsely; then answers without a level, and all."""
    counts = [0.0] * 17
    match, gold = re.search(r"(-1|0|1|2|3)", prediction), LEVELS.index(row["answer"])
    counts[16] = 1.0
    if match is None:
        counts[15] = 1.0
    elif match.group() == row["answer"]:
        counts[3 * gold] = 1.0
    else:
        counts[3 * gold + 1] = 1.0
        counts[3 * LEVELS.index(match.group()) + 2] = 1.0
    return counts


def _macro_f1(sums: Sequence[float]) -> dict[str, float]:
    values = []
    for level in range(len(LEVELS)):
        hit, missed, false = sums[3 * level : 3 * level + 3]
        precision, recall = hit / (hit + false + 1e-5) * 100, hit / (hit + missed + 1e-5) * 100
        values.append(2 * precision * recall / (precision + recall + 1e-5))
    errors, n = sums[15:]
    share = 1 - errors / n
    return {"success-macro-f1": sum(values) / len(values) * share, "success-ratio": 100 * share}


def _highlight(prediction: str, row: Row) -> Sequence[float]:
    try:
        found = released.literal(prediction)
    except ValueError:
        return 0, 0, 0, 0, 1
    if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
        return 0, 0, 0, 0, 1
    listed, gold = set(found or [""]), set(ast.literal_eval(row["answer"]) or [""])
    return len(listed & gold), len(listed), len(gold), 1, 1


def _success_f1(sums: Sequence[float]) -> dict[str, float]:
    hits, found, gold, parsed, n = sums
    ratio = 100 * parsed / n
    return {"success-f1": ratio * round(hits * 2 / (found + gold + TINY), 4), "success-ratio": ratio}


def _simple(prediction: str, row: Row) -> Sequence[float]:
    """tp, fp, fn, n, parsed, answered, BLEU, ROUGE-1, -2, -L. An answer of emoji and full stops only, on
    which the release stops with an error, has no overlap."""
    try:
        found = "\n".join(released.literal(prediction)).strip()
    except (ValueError, TypeError):
        return 0, 0, 0, 1, 0, 0, 0, 0, 0, 0
    gold = released_mrc.answer_text(row)
    counts = float(bool(found and gold)), float(bool(found) > bool(gold)), float(bool(found) < bool(gold))
    if not (found and gold):
        return *counts, 1, 1, 0, 0, 0, 0, 0
    try:
        overlaps = released_mrc.overlaps(found, gold)
    except ValueError:
        overlaps = (0.0, 0.0, 0.0, 0.0)
    return *counts, 1, 1, 1, *overlaps


def _simple_mean(sums: Sequence[float]) -> dict[str, float]:
    tp, fp, fn, n, parsed, answered, *overlaps = sums
    precision, recall = tp / (tp + fp + TINY), tp / (tp + fn + TINY)
    f1 = 2 * precision * recall / (precision + recall + TINY)
    ratio = 100 * parsed / n
    names = ("success-blue", "success-rouge-1", "success-rouge-2", "success-rouge-L")
    means = [ratio * value / answered if answered else 0.0 for value in overlaps]
    main = (ratio * f1 + sum(means)) / 5
    parts = dict(zip(names, means, strict=True))
    return {"mean of five": main, "success-f1": ratio * f1, **parts, "success-ratio": ratio}


def _complex(prediction: str, row: Row) -> Sequence[float]:
    """tp, fp, fn, n, parsed, option F1, option exact match."""
    found, gold = released_mrc.results(prediction), released_mrc.results(row["answer"])
    if found is None or gold is None:
        return 0, 0, 0, 1, 0, 0, 0
    option = released_mrc.compare(gold, found, "Option", released_mrc.OPTION_THRESHOLD)
    return (
        float(bool(found and gold)), float(bool(found) > bool(gold)), float(bool(found) < bool(gold)),
        1, 1, option[0], option[1],
    )  # fmt: skip


def _complex_mean(sums: Sequence[float]) -> dict[str, float]:
    """Without a true positive the release divides by zero, or gives 0: 0 here."""
    tp, fp, fn, n, parsed, option_f1, option_em = sums
    ratio = 100 * parsed / n
    total = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
    f1, em = (ratio * value / parsed if parsed else 0.0 for value in (option_f1, option_em))
    return {
        "mean of three": (ratio * total + f1 + em) / 3,
        "success-total-f1": ratio * total,
        "success-option-f1": f1,
        "success-option-em": em,
        "success-ratio": ratio,
    }


def _query(cosine: Cosine | None) -> ReleasedFile:
    def tally(prediction: str, row: Row) -> Sequence[float]:
        gold = row["answer"]
        longest = max(len(prediction), len(gold))
        near = 1.0 - released.edit_distance(prediction, gold) / longest if longest else 1.0
        return near, 1.0, cosine(prediction, gold) if cosine is not None else 0.0

    def finish(sums: Sequence[float]) -> dict[str, float]:
        anls, n, similarity = sums
        if cosine is None:
            return {"anls": _percent(anls, n)}
        both = _percent(anls + similarity, 2 * n)
        return {"score": both, "anls": _percent(anls, n), "cosine": _percent(similarity, n)}

    return ReleasedFile(tally=tally, finish=finish, partial="" if cosine is not None else PARTIAL)


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else 0.0
