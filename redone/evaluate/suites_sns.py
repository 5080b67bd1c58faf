"""SNS-Bench's twelve files and RedTrans-Bench: the released scorer of each, and the reported number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from redone.evaluate import released, released_mrc
from redone.evaluate.released import CUT, CUT_END, Row, Scores
from redone.reward.segment import cut

Scorer = Callable[[Sequence[str], Sequence[Row]], Scores]
# file -> (task of the paper's table, scorer)
RELEASED: dict[str, tuple[str, Scorer]] = {
    "Note-Taxonomy-single": ("Taxon", released.accuracy(CUT_END)),
    "Note-Taxonomy-multiple": ("Taxon", released.whole_path),
    "Note-Hashtag-single": ("Hash", released.accuracy(CUT_END)),
    "Note-Hashtag-multiple": ("Hash", released.label_sets),
    "Note-QueryCorr-explain": ("QCorr", released.accuracy(CUT)),
    "Note-QueryCorr-topic": ("QCorr", released.levels),
    "Note-MRC-simple": ("MRC", released_mrc.mrc_simple),
    "Note-MRC-complex": ("MRC", released_mrc.mrc_complex),
    "Note-NER": ("NER", released.label_sets),
    "Note-Gender": ("Gender", released.accuracy(CUT)),
    "Note-CHLW": ("CHLW", released.highlights),
    "Note-QueryGen": ("QGen", released.anls),
}
MAIN = {
    "Note-MRC-simple": tuple(f"success-{k}" for k in ("f1", "blue", "rouge-1", "rouge-2", "rouge-L")),
    "Note-MRC-complex": ("success-total-f1", "success-option-f1", "success-option-em"),
    "Note-CHLW": ("success-f1",),
    "Note-QueryCorr-topic": ("success-macro-f1",),
    "Note-QueryGen": (),
}


def reported(file: str, scores: Scores) -> float | None:
    """The number of the main table, 0-100; None for QueryGen, whose cosine half is missing."""
    keys = MAIN.get(file)
    if keys is None:
        return next(scores[key] for key in ("accuracy", "f1", "score") if key in scores)
    return float(np.mean([scores[key] for key in keys])) if keys else None


def redtrans(predictions: Sequence[str], rows: Sequence[Row], *, extra: bool = True) -> Scores:
    """One direction: mean sentence BLEU and chrF2 (0-100); `extra`: what RedTrans' own utils give (0-1)."""
    chinese = rows[0]["dst_lang"] == "zh"
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(tokenize="zh" if chinese else "13a", effective_order=True), CHRF(beta=2)
    columns: dict[str, list[float]] = {}
    for prediction, row in zip(predictions, rows, strict=True):
        gold = str(row[row["dst_lang"]])
        found = {
            "bleu_score": bleu.sentence_score(prediction.strip(), [gold.strip()]).score / 100,
            "chrf_score": chrf.sentence_score(prediction.strip(), [gold.strip()]).score / 100,
        }
        if extra:
            found |= {
                "utils-bleu-jieba-mean": _jieba_bleu(prediction, gold),
                "utils-rougeL-mean": _rouge_l(prediction, gold, chinese),
                "utils-chrf-mean": chrf.sentence_score(prediction, [gold]).score / 100,
            }
            if chinese:
                found["utils-sacrebleu-zh-mean"] = bleu.sentence_score(prediction, [gold]).score / 100
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    return {n: float(np.mean(v)) * (1 if n.startswith("utils") else 100) for n, v in columns.items()}


def _jieba_bleu(prediction: str, gold: str) -> float:
    """nltk's with its smoothing method 1; jieba on both sides in both directions, blanks are tokens."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    return float(sentence_bleu([cut(gold)], cut(prediction), smoothing_function=SmoothingFunction().method1))


def _rouge_l(prediction: str, gold: str, chinese: bool) -> float:
    """0 when a Chinese side holds no Chinese character, as released."""
    if chinese and not all(any("\u4e00" <= c <= "\u9fff" for c in text) for text in (prediction, gold)):
        return 0.0
    return float(_rouge_scorer(chinese).score(gold, prediction)["rougeL"].fmeasure)


class _Cut:
    def tokenize(self, text: str) -> list[str]:
        return cut(text)


@lru_cache(maxsize=2)
def _rouge_scorer(chinese: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Cut()) if chinese else RougeScorer(["rougeL"], use_stemmer=True)
