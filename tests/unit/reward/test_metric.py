"""Overlap metrics: right tokenisers, known values, and the gaming table of the literature."""

from __future__ import annotations

from typing import Any

import pytest
from rewarding import answer, prompt
from sacrebleu.metrics import BLEU, CHRF

from redone.config.schema import MetricReward
from redone.reward.metric import METRICS, Metric

ZH = (
    "今天的天气真不错，我们一起去公园散步吧！记得带上相机，樱花已经开了，超级好看yyds，"
    "路上还可以买一杯奶茶，慢慢走慢慢拍，晚上回家一起整理照片再发小红书。"
)
EN = "The weather is lovely today, so let us take a walk in the park and bring the camera along."
CHATTER = "Here is the translation: {} I hope this helps!"


def raw(text: str, reference: Any, **config: Any) -> float:
    score = Metric(MetricReward(**config)).score(prompt(reference), answer(text))
    assert score.status == "ok", score.detail
    return score.raw


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("reference", [ZH, EN, "好", "ok"], ids=["zh", "en", "char", "word"])
def test_the_reference_itself_scores_one(name: str, reference: str) -> None:
    assert raw(reference, reference, metrics=(name,)) == 1.0
    if name != "rouge2" or len(reference) > 2:
        assert METRICS[name](reference, reference, reference in (ZH, "好")) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("reference", [ZH, EN], ids=["zh", "en"])
def test_length_gaming_does_not_score(name: str, reference: str) -> None:
    """notes on published gaming: ref twice BLEU 47.7 / chrF++ 82.8, ref with chatter 62.2 / 89.3."""
    twice, chatter = reference + reference, CHATTER.format(reference)
    assert METRICS[name](twice, reference, reference == ZH) > 0.4  # the bare metric is fooled
    assert raw(twice, reference, metrics=(name,)) == 0
    assert raw(f"{reference}\n{reference}", reference, metrics=(name,)) == 0
    assert raw(chatter, reference, metrics=(name,)) == 0
    assert raw(reference[:20], reference, metrics=(name,)) == 0
    assert raw("", reference, metrics=(name,)) == 0


def test_a_truncated_half_scores_low() -> None:
    half = ZH[: len(ZH) // 2]
    assert raw(half, ZH, metrics=("bleu",), min_length_ratio=0.4) < 0.4
    assert raw(half, ZH, min_length_ratio=0.4) < raw(ZH[:-6], ZH) < 1


def test_length_factor_is_linear_and_short_references_have_slack() -> None:
    reference = "a" * 10 + "bcdefghijk" * 9
    scores = [
        raw(reference + " z" * extra, reference, metrics=("chrf",)) for extra in (0, 10, 25, 40, 44, 60)
    ]
    assert scores == sorted(scores, reverse=True) and scores[-1] == scores[-2] == 0 < scores[-3] < scores[1]
    assert raw("真好吃！", "好吃") > 0
    assert raw("好吃好吃", "好吃") == 0


def test_values_are_sacrebleus() -> None:
    hypothesis = ZH.replace("公园散步", "公园里走走")
    bleu = BLEU(tokenize="zh", effective_order=True).sentence_score(hypothesis, [ZH]).score / 100
    chrf = CHRF().sentence_score(hypothesis, [ZH]).score / 100
    assert raw(hypothesis, ZH, metrics=("bleu",)) == pytest.approx(bleu, abs=1e-9)
    assert raw(hypothesis, ZH, metrics=("bleu", "chrf"), weights=(3, 1)) == pytest.approx(
        0.75 * bleu + 0.25 * chrf, abs=1e-9
    )
    english = EN.replace("lovely", "fine")
    plus = CHRF(word_order=2).sentence_score(english, [EN]).score / 100
    assert raw(english, EN, metrics=("chrf++",)) == pytest.approx(plus, abs=1e-9)


def test_chinese_goes_through_chinese_tokenisers() -> None:
    hypothesis = ZH.replace("超级好看", "特别好看")
    for name in METRICS:
        assert raw(hypothesis, ZH, metrics=(name,)) > 0.8
    assert raw(hypothesis, ZH, metrics=("rouge1",), language="en") < 0.5 or "yyds" in ZH
    assert METRICS["bleu"](hypothesis, ZH, False) < 0.3  # 13a sees clauses as words


def test_several_references_and_bad_ones() -> None:
    assert raw(EN, [ZH, EN]) == 1.0
    for reference in ("", "  ", 3, [], ["x", ""]):
        assert Metric(MetricReward()).score(prompt(reference), answer("x")).status == "error"


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="one per metric"):
        MetricReward(weights=(1.0,))
    with pytest.raises(ValueError, match="exceeds max_length_ratio"):
        MetricReward(free_length_ratio=2)
