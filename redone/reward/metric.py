"""Overlap with a reference (RedOne 2.0 section 3.2.2, R_Met): BLEU, chrF, chrF++, ROUGE, mixed, in [0, 1].

Overlap metrics are cheap to inflate with length (chrF weighs recall twice): a response that is much longer
than the reference, or repeats itself, earns nothing. The metric is not computed then: its cost is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from redone.config.schema import MetricReward
from redone.reward.base import failed, make_score
from redone.reward.extract import extract, fold, strip_outer
from redone.reward.segment import has_han, spaced, words
from redone.types import Completion, Prompt, Score

CACHED = 512  # references whose n-grams are kept: the responses of a group share one
SLACK = 4  # characters beyond the reference's length that are never held against a response
MetricFn = Callable[[str, str, bool], float]


class Metric:
    """A RewardFn. The reference is a text, or a list of texts of which the best counts."""

    def __init__(self, config: MetricReward) -> None:
        self._config = config
        weights = config.weights or (1.0,) * len(config.metrics)
        self._mixture = [(name, w / sum(weights)) for name, w in zip(config.metrics, weights, strict=True)]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        config = self._config
        references = [prompt.reference] if isinstance(prompt.reference, str) else prompt.reference
        if not isinstance(references, list | tuple) or not references:
            return failed(f"metric reward needs a text as reference, not {prompt.reference!r:.80}")
        if not all(isinstance(r, str) and fold(r) for r in references):
            return failed(f"metric reward: empty or no text in the reference {prompt.reference!r:.80}")
        if config.require_stop and completion.finish != "stop":
            return make_score(0.0, config, detail=f"not finished ({completion.finish})")
        answer = extract(completion.text, config)
        if answer is None:
            return make_score(0.0, config, detail=f"no answer found (extract={config.extract})")
        hypothesis = " ".join(answer.split())
        scored = [self._against(hypothesis, " ".join(reference.split())) for reference in references]
        return max(scored, key=lambda score: score.raw)

    def _against(self, hypothesis: str, reference: str) -> Score:
        config = self._config
        if hypothesis == reference:
            return make_score(1.0, config, parts={name: 1.0 for name, _ in self._mixture})
        factor, why = length_factor(hypothesis, reference, config)
        if factor == 0.0:
            return make_score(0.0, config, detail=why)
        chinese = has_han(reference) if config.language == "auto" else config.language == "zh"
        parts: dict[str, float] = {
            name: METRICS[name](hypothesis, reference, chinese) for name, _ in self._mixture
        }
        mixed = sum(weight * parts[name] for name, weight in self._mixture)
        return make_score(
            min(1.0, factor * mixed), config, parts={**parts, "length_factor": factor}, detail=why
        )


def length_factor(hypothesis: str, reference: str, config: MetricReward) -> tuple[float, str]:
    """(factor in [0, 1], reason when below 1). Lengths are characters without blanks."""
    tight, wanted = "".join(hypothesis.split()), "".join(reference.split())
    ratio = len(tight) / max(1, len(wanted))
    if ratio < config.min_length_ratio and len(wanted) - len(tight) > SLACK:
        return 0.0, f"length ratio {ratio:.2f} below {config.min_length_ratio}"
    if not tight:
        return 0.0, "empty"
    if tight.count(wanted) > 1 and not strip_outer(tight.replace(wanted, "")):
        return 0.0, "the answer is repeated"
    excess = (len(tight) - SLACK) / max(1, len(wanted))
    if excess <= config.free_length_ratio:
        return 1.0, ""
    if excess >= config.max_length_ratio:
        return 0.0, f"length ratio {ratio:.2f} above {config.max_length_ratio}"
    span = config.max_length_ratio - config.free_length_ratio
    return (config.max_length_ratio - excess) / span, f"length ratio {ratio:.2f}"


def bleu(hypothesis: str, reference: str, chinese: bool) -> float:
    """Sentence BLEU (sacrebleu, exponential smoothing, effective order), tokens of `zh` or `13a`."""
    scorer = _bleu(reference, "zh" if chinese else "13a")
    return min(1.0, float(scorer.corpus_score([hypothesis], None).score) / 100)


def chrf(hypothesis: str, reference: str, chinese: bool) -> float:
    """chrF2: character 6-grams, recall weighted twice."""
    return min(1.0, float(_chrf(reference, 0).corpus_score([hypothesis], None).score) / 100)


def chrf_pp(hypothesis: str, reference: str, chinese: bool) -> float:
    """chrF++: with word 1- and 2-grams. Chinese has no blanks, so its characters are set apart first: else a
    whole sentence would be one word."""
    if chinese:
        hypothesis, reference = spaced(hypothesis), spaced(reference)
    return min(1.0, float(_chrf(reference, 2).corpus_score([hypothesis], None).score) / 100)


def rouge(name: str) -> MetricFn:
    """F1 of rouge-score. Its own tokeniser drops everything but [a-z0-9], so Chinese goes through jieba."""

    def compute(hypothesis: str, reference: str, chinese: bool) -> float:
        return float(_rouge(name, chinese).score(reference, hypothesis)[name].fmeasure)

    return compute


METRICS: dict[str, MetricFn] = {
    "bleu": bleu,
    "chrf": chrf,
    "chrf++": chrf_pp,
    "rouge1": rouge("rouge1"),
    "rouge2": rouge("rouge2"),
    "rougeL": rouge("rougeL"),
}


@lru_cache(maxsize=CACHED)
def _bleu(reference: str, tokenize: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenize, effective_order=True, references=[[reference]])


@lru_cache(maxsize=CACHED)
def _chrf(reference: str, word_order: int) -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(word_order=word_order, references=[[reference]])


class _JiebaTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=8)
def _rouge(name: str, chinese: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], use_stemmer=False, tokenizer=_JiebaTokenizer() if chinese else None)
