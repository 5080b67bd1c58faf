"""The arithmetic of SNS-Bench's and RedTrans' released scorers, faults included, so that a result can be laid
beside published ones. Written from its behaviour; model outputs are parsed as literals, never evaluated.

Known faults, all kept: the cut at `<`, `>` and the literal `end` (unescaped bars), gold answers with a comma
or full stop that can never match, an empty list that counts as a list with one empty string, the first level
found in an answer wins. `corrected.py` is the mended reading.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Scores = dict[str, float]

CUT = r"[\n.,]|<|endofresponse|>"
CUT_END = CUT + r"|<|end|>|<|im_end|>"
CUT_LIST = r"[\n]|<|endofresponse|>"
INNERMOST = re.compile(r"\[[^\[\]]*\]", re.DOTALL)
TINY = 0.0001
LEVELS = ("-1", "0", "1", "2", "3")


def cut_label(text: str, pattern: str) -> str:
    """What stands before the first separator."""
    return re.split(pattern, text.replace("Answer:", "").strip(), maxsplit=1)[0].strip()


def cut_list(text: str) -> list[str]:
    """Comma-separated parts of the first line; empty parts are dropped, blank ones are not."""
    line = re.split(CUT_LIST, text.replace("Answer:", "").strip(), maxsplit=1)[0]
    return [part.strip() for part in line.split(",") if part]


def clean(text: str) -> str:
    """OpenCompass' general clean-up: cut, drop punctuation and English articles, single blanks."""
    text = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text, maxsplit=1)[0])
    text = re.sub(r"\b(a|an|the)\b", "", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip()


def literal(text: str) -> Any:
    """The first innermost [...] of `text`, or all of it, as a literal. Raises ValueError when it is none."""
    found = INNERMOST.search(text)
    try:
        return ast.literal_eval(found.group(0) if found else text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error


def accuracy(pattern: str) -> Callable[[Sequence[str], Sequence[Row]], Scores]:
    def score(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
        hits = [cut_label(p, pattern) == row["answer"] for p, row in zip(predictions, rows, strict=True)]
        return {"accuracy": 100 * sum(hits) / len(hits)}

    return score


def whole_path(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """Taxonomy-multiple: the cleaned prediction equals the raw or the cleaned gold."""
    hits = 0
    for prediction, row in zip(predictions, rows, strict=True):
        found = clean(cut_label(prediction, CUT_END))
        hits += found in (clean(row["answer"]), row["answer"])
    return {"score": hits / len(rows) * 100}


def micro(pairs: Sequence[tuple[set[str], set[str]]]) -> tuple[float, float, float]:
    """(F1, precision, recall) over (found, gold) sets, each rounded to 4 decimals."""
    hits = sum(len(found & gold) for found, gold in pairs)
    found_size, gold_size = sum(len(f) for f, _ in pairs), sum(len(g) for _, g in pairs)
    f1 = round(hits * 2 / (found_size + gold_size + TINY), 4)
    return f1, round(hits / (found_size + TINY), 4), round(hits / (gold_size + TINY), 4)


def label_sets(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """Hashtag-multiple and NER."""
    pairs = [(set(cut_list(p)), set(cut_list(r["answer"]))) for p, r in zip(predictions, rows, strict=True)]
    return {"f1": micro(pairs)[0] * 100}


def highlights(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """CHLW: micro scores over what parses, times the share that does."""
    pairs: list[tuple[set[str], set[str]]] = []
    for prediction, row in zip(predictions, rows, strict=True):
        try:
            found = literal(prediction)
        except ValueError:
            continue
        if isinstance(found, list) and all(isinstance(value, str) for value in found):
            pairs.append((set(found or [""]), set(ast.literal_eval(row["answer"]) or [""])))
    f1, precision, recall = micro(pairs)
    ratio = (1 - (len(rows) - len(pairs)) / len(rows)) * 100
    parts = {"f1": f1, "precision": precision, "recall": recall}
    return (
        {"success-ratio": ratio}
        | {name: value * 100 for name, value in parts.items()}
        | {f"success-{name}": ratio * value for name, value in parts.items()}
    )


def levels(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """QueryCorr-topic: the first level in the output; macro F1 times the share of outputs with one."""
    hits, misses, false = (dict.fromkeys(LEVELS, 0) for _ in range(3))
    errors = 0
    for prediction, row in zip(predictions, rows, strict=True):
        found, gold = re.search(r"(-1|0|1|2|3)", prediction), row["answer"]
        if found is None:
            errors += 1
        elif found.group() == gold:
            hits[gold] += 1
        else:
            misses[gold] += 1
            false[found.group()] += 1
    scores = {"success-ratio": (1 - errors / len(rows)) * 100}
    for level in LEVELS:
        precision = hits[level] / (hits[level] + false[level] + 1e-5) * 100
        recall = hits[level] / (hits[level] + misses[level] + 1e-5) * 100
        scores[f"level({level})-precision"], scores[f"level({level})-recall"] = precision, recall
        scores[f"level({level})-f1"] = 2 * precision * recall / (precision + recall + 1e-5)
    mean = float(np.mean([scores[f"level({level})-f1"] for level in LEVELS]))
    return scores | {"success-macro-f1": mean * (1 - errors / len(rows))}


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last if x == y else 1 + min(last, row[j], row[j - 1])
    return row[-1]


def anls(predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """QueryGen's half that needs no embedding model: 1 - normalised edit distance. Partial: the released
    score is its mean with a cosine."""
    values = []
    for prediction, row in zip(predictions, rows, strict=True):
        longest = max(len(prediction), len(row["answer"]))
        values.append((1.0 - edit_distance(prediction, row["answer"]) / longest) * 100)
    return {"anls-mean": float(np.mean(values))}
