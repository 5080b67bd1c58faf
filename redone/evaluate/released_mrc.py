"""Reading comprehension of SNS-Bench as its released scorers compute it (see released.py).

Two misnomers are kept: the answer-level keys ending in -f1 hold a mean precision, those in -em a mean recall.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from redone.evaluate.released import TINY, Row, Scores, literal
from redone.evaluate.rouge_released import rouge_l
from redone.reward.segment import HAN_RELEASED, cut

DROPPED = frozenset(":_`，。：？！()“”；’《》·、,「」（）－～『』|")
OPTION_THRESHOLD, REASON_THRESHOLD = 0.8, 0.5


def answer_text(row: Row) -> str:
    """The gold sentences without anything between them; "" when the question has no answer in the note."""
    return "".join(row["answer"])


def mrc_simple(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """Existence counts over all outputs that parse, then BLEU and ROUGE where both sides answer."""
    counts = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    answered: list[tuple[str, str]] = []
    parsed = 0
    for prediction, row in zip(predictions, rows, strict=True):
        try:
            found = "\n".join(literal(prediction)).strip()
        except (ValueError, TypeError):
            continue
        parsed += 1
        gold = answer_text(row)
        counts[("t" if bool(found) == bool(gold) else "f") + ("p" if found else "n")] += 1
        if found and gold:
            answered.append((found, gold))
    n = len(rows)
    precision = counts["tp"] / (counts["tp"] + counts["fp"] + TINY)
    recall = counts["tp"] / (counts["tp"] + counts["fn"] + TINY)
    f1 = 2 * precision * recall / (precision + recall + TINY)
    ratio = (1 - (n - parsed) / n) * 100
    overlap = np.asarray([overlaps(found, gold) for found, gold in answered]).reshape(-1, 4)
    names = ("blue", "rouge-1", "rouge-2", "rouge-L")
    means = [float(v) for v in overlap.mean(axis=0)] if answered else [0.0] * 4
    return (
        {"success-ratio": ratio}
        | {f"total-{name}": count / n * 100 for name, count in counts.items()}
        | {"total-precision": precision * 100, "total-recall": recall * 100, "total-f1": f1 * 100}
        | {name: mean * 100 for name, mean in zip(names, means, strict=True)}
        | {"success-f1": ratio * f1}
        | {f"success-{name}": ratio * mean for name, mean in zip(names, means, strict=True)}
    )


def overlaps(found: str, gold: str) -> tuple[float, float, float, float]:
    """(unsmoothed sentence BLEU, ROUGE-1, -2, -L F1) on jieba tokens, emoji stripped."""
    from nltk.translate.bleu_score import sentence_bleu

    hypothesis, reference = cut(_plain(found)), cut(_plain(gold))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk's advice to smooth
        bleu = float(sentence_bleu([reference], hypothesis))
    rouge = _rouge().get_scores(" ".join(hypothesis), " ".join(reference))[0]
    longest = rouge_l(hypothesis, reference)
    return bleu, float(rouge["rouge-1"]["f"]), float(rouge["rouge-2"]["f"]), longest


def _plain(text: str) -> str:
    import demoji

    return str(demoji.replace(text.replace("\n", "").replace("\ufffd", ""), ""))


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge import Rouge

    return Rouge(["rouge-1", "rouge-2"])


def results(text: str) -> list[dict[str, str]] | None:
    """The options of the last <Result>, one reason per option; None when it cannot be parsed."""
    found = re.findall(r"(?<=<Result>).+?(?=</Result>)", text, re.DOTALL)
    if not found:
        return None
    try:
        values = json.loads(found[-1].strip().lstrip("```json").rstrip("```"))  # noqa: B005 as released
        if not isinstance(values, list):
            return None
        reasons = {value["Option"]: value["Reason"] for value in values}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(isinstance(text, str) for pair in reasons.items() for text in pair):
        return None
    return [{"Option": option, "Reason": reason} for option, reason in reasons.items()]


def mrc_complex(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """Existence, and closeness of options and reasons. Raises ZeroDivisionError where the release does."""
    counts = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    lists: dict[str, list[tuple[float, float, float, float]]] = {"option": [], "reason": []}
    for prediction, row in zip(predictions, rows, strict=True):
        found, gold = results(prediction), results(row["answer"])
        if found is None or gold is None:
            continue
        counts[("t" if bool(found) == bool(gold) else "f") + ("p" if found else "n")] += 1
        lists["option"].append(compare(gold, found, "Option", OPTION_THRESHOLD))
        lists["reason"].append(compare(gold, found, "Reason", REASON_THRESHOLD))
    ratio = (1 - (len(rows) - len(lists["option"])) / len(rows)) * 100
    positive, possible = counts["tp"] + counts["fp"], counts["tp"] + counts["fn"]
    precision = counts["tp"] / positive if positive else -1.0
    recall = counts["tp"] / possible if possible else -1.0
    f1 = 2 * precision * recall / (precision + recall)
    plain = {
        "total-precision": precision if precision > 0 else 0.0,
        "total-recall": recall if precision > 0 else 0.0,
        "total-f1": f1 if f1 > 0 else 0.0,
    }
    for name, values in lists.items():
        means = np.asarray(values).mean(axis=0) if values else np.zeros(4)
        plain |= {f"{name}-f1": float(means[0]), f"{name}-em": float(means[1])}
        plain |= {f"answer-level-{name}-f1": float(means[2]), f"answer-level-{name}-em": float(means[3])}
    return (
        {"success-ratio": ratio}
        | {name: value * 100 for name, value in plain.items()}
        | {f"success-{name}": ratio * value for name, value in plain.items()}
    )


def compare(
    gold: Sequence[dict[str, str]], found: Sequence[dict[str, str]], key: str, threshold: float
) -> tuple[float, float, float, float]:
    """(mean best F1, mean exact match, share of found near a gold, share of golds near a found)."""
    if not gold or not found:
        return (1, 1, 1, 1) if not gold and not found else (0, 0, 0, 0)
    golds = [normalise(item[key]) for item in gold]
    founds = [normalise(item[key]) for item in found]
    close = np.asarray([[closeness(g, f) for g in golds] for f in founds])
    hits = int((close.max(axis=1) > threshold).sum())
    missed = int((close.max(axis=0) <= threshold).sum())
    same = float(np.mean([f in golds for f in founds]))
    precision, recall = (hits / len(founds), hits / (hits + missed)) if hits else (0.0, 0.0)
    return float(close.max(axis=1).mean()), same, precision, recall


def normalise(text: str) -> str:
    return "".join(char for char in text.lower() if char not in DROPPED)


def closeness(gold: str, found: str) -> float:
    """F1 of the longest common run of segments: Chinese characters and `=` each, all else in one."""
    a, b = segments(gold), segments(found)
    longest, row = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0, *(row[j] + 1 if x == y else 0 for j, y in enumerate(b))]
        longest = max(longest, *row)
    if not longest:
        return 0.0
    precision, recall = longest / len(b), longest / len(a)
    return 2 * precision * recall / (precision + recall)


def segments(text: str) -> list[str]:
    return [part for part in HAN_RELEASED.split(text) if part]
