"""Scores as sums: an answer becomes a few numbers, and a score is a function of their sums over items.

So one rule serves means, micro F1 and corpus BLEU alike: a bootstrap resample, or one of two models on the
same resample, is another weighted sum of the same numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redone.evaluate.items import EvalItem
from redone.evaluate.measures_sns import CorrectedFile, Cosine, ReleasedFile, make_corrected, make_released
from redone.evaluate.suite import (
    IfevalMetric,
    Metric,
    PassAtK,
    RewardMetric,
    SnsCorrected,
    SnsReleased,
    TranslationMetric,
)
from redone.types import Score

Floats = NDArray[np.float64]
Scores = dict[str, float]  # score -> 0..100; the first is the main one


class Measure(ABC):
    """`readings`: suffixes of the reward keys whose Scores `tally` needs ("" for the metric's own key)."""

    readings: tuple[str, ...] = ()
    mean: bool = False  # the main score is 100 * sum of column 0 / sum of column 1
    partial: str = ""  # why this is only a part of the published score

    @abstractmethod
    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        """The numbers of one answer; all 0 when its reward failed, so that it counts nowhere."""

    @abstractmethod
    def finish(self, sums: Sequence[float]) -> Scores: ...

    def replicates(self, numbers: Floats) -> Floats:
        """[samples, items, k] -> [R, items, k']: the score is the mean over R of finish(sum over items)."""
        return numbers


class RewardMean(Measure):
    readings, mean = ("",), True

    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        score = scores[""]
        return (score.raw, 1.0) if score.status == "ok" else (0.0, 0.0)

    def finish(self, sums: Sequence[float]) -> Scores:
        return {"score": _percent(sums[0], sums[1])}


class Passes(Measure):
    readings, mean = ("",), True

    def __init__(self, k: Sequence[int], samples: int) -> None:
        self.k = [value for value in k if value <= samples] or [1]

    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        score = scores[""]
        return (float(score.correct), 1.0) if score.status == "ok" else (0.0, 0.0)

    def replicates(self, numbers: Floats) -> Floats:
        """[1, items, 1 + len(k)]: pass@k[0], counted, the other pass@k."""
        correct, tried = numbers[..., 0].sum(axis=0), numbers[..., 1].sum(axis=0)
        columns = []
        for k in self.k:
            pairs = zip(tried, correct, strict=True)
            columns.append([pass_at_k(int(n), int(c), k) if n >= k else 0.0 for n, c in pairs])
        counted = (tried >= max(self.k)).astype(float)
        return np.stack([np.asarray(c) * counted for c in (columns[0], counted, *columns[1:])], axis=-1)[None]

    def finish(self, sums: Sequence[float]) -> Scores:
        values = (sums[0], *sums[2:])
        return {f"pass@{k}": _percent(v, sums[1]) for k, v in zip(self.k, values, strict=True)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n answers, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


class Ifeval(Measure):
    readings, mean = ("strict", "loose"), True

    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        strict, loose = scores["strict"], scores["loose"]
        if strict.status != "ok" or loose.status != "ok":
            return (0.0,) * 6
        count = len(item.row["instruction_id_list"])
        passed = [round(score.raw * count) for score in (strict, loose)]
        return (
            float(passed[0] == count), 1.0, passed[0], float(passed[1] == count), passed[1], count
        )  # fmt: skip

    def finish(self, sums: Sequence[float]) -> Scores:
        prompt, items, instruction, prompt_loose, instruction_loose, instructions = sums
        return {
            "prompt-strict": _percent(prompt, items),
            "instruction-strict": _percent(instruction, instructions),
            "prompt-loose": _percent(prompt_loose, items),
            "instruction-loose": _percent(instruction_loose, instructions),
        }


class Translation(Measure):
    """Corpus scores from sacrebleu's own sufficient statistics, and means of sentence scores as released."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.bleu, self.sentence, self.plus, self.two = _translation_metrics(language)

    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        hypothesis, gold = answer.strip(), str(item.row[self.language]).strip()
        found = self.bleu.sentence_score(hypothesis, [gold])
        # n-gram counts (hypothesis, reference, matching) of every order: what sacrebleu sums over a corpus
        plus = self.plus._extract_corpus_statistics([hypothesis], [[gold]])[0]
        two = self.two._extract_corpus_statistics([hypothesis], [[gold]])[0]
        means = (
            self.sentence.sentence_score(hypothesis, [gold]).score,
            self.two.sentence_score(hypothesis, [gold]).score,
        )
        return (1.0, *means, found.sys_len, found.ref_len, *found.counts, *found.totals, *plus, *two)

    def finish(self, sums: Sequence[float]) -> Scores:
        n, bleu, chrf, hypothesis, gold = sums[:5]
        counts, totals = ([round(v) for v in part] for part in (sums[5:9], sums[9:13]))
        orders = 3 * (self.plus.char_order + self.plus.word_order)
        corpus = self.bleu.compute_bleu(
            correct=counts, total=totals, sys_len=round(hypothesis), ref_len=round(gold),
            smooth_method="exp", max_ngram_order=4,
        )  # fmt: skip
        return {
            "BLEU": corpus.score,
            "chrF++": float(self.plus._compute_f_score(list(sums[13 : 13 + orders]))),
            "chrF2": float(self.two._compute_f_score(list(sums[13 + orders :]))),
            "sentence-BLEU (released)": bleu / n if n else 0.0,
            "sentence-chrF2 (released)": chrf / n if n else 0.0,
        }


@lru_cache(maxsize=2)
def _translation_metrics(language: str) -> tuple[Any, Any, Any, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    tokenize = "zh" if language == "zh" else "13a"
    return (
        BLEU(tokenize=tokenize),
        BLEU(tokenize=tokenize, effective_order=True),
        CHRF(word_order=2),
        CHRF(word_order=0),
    )


class Released(Measure):
    def __init__(self, file: ReleasedFile) -> None:
        self.file, self.mean, self.partial = file, file.mean, file.partial

    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        return self.file.tally(answer, item.row)

    def finish(self, sums: Sequence[float]) -> Scores:
        return self.file.finish(sums)


class Corrected(Measure):
    mean = True

    def __init__(self, file: CorrectedFile) -> None:
        self.file = file

    def tally(self, answer: str, item: EvalItem, scores: Mapping[str, Score]) -> Sequence[float]:
        return self.file.tally(answer, item.row)

    def finish(self, sums: Sequence[float]) -> Scores:
        return self.file.finish(sums)


def make_measure(metric: Metric, samples: int, cosine: Cosine | None = None) -> Measure:
    """Of a suite's metric. `cosine`: of two texts, for the half of QueryGen that needs a model."""
    match metric:
        case RewardMetric():
            return RewardMean()
        case PassAtK():
            return Passes(metric.k, samples)
        case IfevalMetric():
            return Ifeval()
        case TranslationMetric():
            return Translation(metric.language)
        case SnsReleased():
            return Released(make_released(metric.file, cosine))
        case SnsCorrected():
            return Corrected(make_corrected(metric.file))


def _percent(part: float, whole: float) -> float:
    return 100.0 * part / whole if whole else 0.0
