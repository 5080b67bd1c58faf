"""SNS-Bench scored as its tasks mean it: per item, without the released scorers' faults (released.py).

What is mended: gold answers with commas, full stops or `end` can match; an answer that cannot be parsed is
wrong instead of being left out; an empty gold list is right or wrong as a whole, so that always answering []
earns its share of empty golds and no more; a level counts only when it is the only one; listing every
candidate earns nothing. Every score is a mean over items in [0, 1], times 100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from redone.evaluate.released import Row, Scores, edit_distance
from redone.evaluate.released_mrc import closeness, normalise, results
from redone.reward.exact import parse_list
from redone.reward.extract import normalise as fold_answer
from redone.reward.metric import rouge
from redone.reward.segment import has_han

ItemScorer = Callable[[str, Row], float]
ROUGE_L = rouge("rougeL")
LEVELS = ("-1", "0", "1", "2", "3")


def single(prediction: str, row: Row) -> float:
    """The whole answer equals the gold: case, width, outer punctuation and a leading `Answer:` aside."""
    return float(_plain(prediction) == _plain(row["answer"]))


def path(prediction: str, row: Row) -> float:
    """Every step of `A | B | C` is right."""
    found, gold = ([_plain(step) for step in text.split("|")] for text in (prediction, row["answer"]))
    return float(found == gold)


def level(prediction: str, row: Row) -> float:
    """The answer is one level and nothing else."""
    found = _answer(prediction).strip().strip(".。")
    return float(found in LEVELS and found == row["answer"])


def labels(prediction: str, row: Row) -> float:
    """F1 of the comma-separated sets; 0 for more than twice the gold's labels, or for every candidate."""
    found = [_plain(part) for part in _answer(prediction).split(",")]
    gold = {_plain(part) for part in row["answer"].split(",")} - {""}
    everything = {_plain(part) for part in str(row.get("candidates", "")).split(",")} - {""}
    if everything and set(found) >= everything and gold != everything:
        return 0.0
    return set_f1([f for f in found if f], gold)


def word_list(prediction: str, row: Row) -> float:
    """F1 of two Python lists; a list that cannot be parsed is wrong; [] is right iff the gold is []."""
    found = parse_list(_answer(prediction))
    if found is None:
        return 0.0
    return set_f1(found, set(parse_list(row["answer"]) or ()))


def options(prediction: str, row: Row) -> float:
    """MRC-complex: F1 of the options, each matched to one gold option by closeness over 0.8."""
    found, gold = results(prediction), results(row["answer"])
    if found is None:
        return 0.0
    if not found or not gold:
        return float(not found and not gold)
    left = [normalise(item["Option"]) for item in gold]
    hits = 0
    for item in found:
        match = next((g for g in left if closeness(g, normalise(item["Option"])) > 0.8), None)
        if match is not None:
            left.remove(match)
            hits += 1
    return 2 * hits / (len(found) + len(gold))


def sentences(prediction: str, row: Row) -> float:
    """MRC-simple: ROUGE-L of the sentences found and the gold ones; [] is right iff the gold is empty.

    A list of the whole note gains in recall what it loses in precision; what is no list is wrong. The
    released ROUGE-L counts a repeated word once, so that repetition costs nothing there; here it does.
    """
    listed = parse_list(prediction[prediction.find("[") : prediction.rfind("]") + 1])
    if listed is None:
        return 0.0
    found, gold = ("\n".join(texts).strip() for texts in (listed, row["answer"]))
    if not found or not gold or found == gold:
        return float(found == gold)
    return ROUGE_L(found, gold, has_han(gold))


def query(prediction: str, row: Row) -> float:
    """QueryGen: similarity by edit distance, case and outer punctuation aside; a stand-in for judgement."""
    found, gold = _plain(prediction), _plain(row["answer"])
    longest = max(len(found), len(gold))
    return 1.0 - edit_distance(found, gold) / longest if longest else 1.0


def set_f1(found: Sequence[str], gold: set[str]) -> float:
    """1 iff both are empty when one is; 0 for more than twice as many as there are."""
    if not gold or not found:
        return float(not gold and not found)
    distinct = set(found)
    if len(distinct) > 2 * len(gold):
        return 0.0
    return 2 * len(distinct & gold) / (len(distinct) + len(gold))


CORRECTED: dict[str, ItemScorer] = {
    "Note-Taxonomy-single": single,
    "Note-Taxonomy-multiple": path,
    "Note-Hashtag-single": single,
    "Note-Hashtag-multiple": labels,
    "Note-QueryCorr-explain": single,
    "Note-QueryCorr-topic": level,
    "Note-MRC-simple": sentences,
    "Note-MRC-complex": options,
    "Note-NER": labels,
    "Note-Gender": single,
    "Note-CHLW": word_list,
    "Note-QueryGen": query,
}


def corrected(file: str, predictions: Sequence[str], rows: Sequence[Row]) -> Scores:
    """{"corrected": mean, "corrected-balanced": mean of empty and non-empty golds} of one file, 0-100.

    Balanced is what a constant [] cannot lift above 50: it is given where the file has empty golds.
    """
    score = CORRECTED[file]
    values = [score(p, row) for p, row in zip(predictions, rows, strict=True)]
    found = {"corrected": 100 * float(np.mean(values))}
    empty = [has_empty_gold(file, row) for row in rows]
    if any(empty) and not all(empty):
        halves = [[v for v, e in zip(values, empty, strict=True) if e is wanted] for wanted in (True, False)]
        found["corrected-balanced"] = 100 * float(np.mean([np.mean(half) for half in halves]))
    return found


def has_empty_gold(file: str, row: Row) -> bool:
    """Nothing is to be found: what a constant empty answer gets right."""
    if file == "Note-MRC-simple":
        return not any(sentence.strip() for sentence in row["answer"])
    if file == "Note-CHLW":
        return parse_list(row["answer"]) == []
    return file == "Note-MRC-complex" and results(row["answer"]) == []


def _answer(text: str) -> str:
    return text.strip().removeprefix("Answer:").strip()


def _plain(text: str) -> str:
    return fold_answer(_answer(text))
