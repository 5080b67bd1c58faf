"""Sums of measures give the published arithmetic: released scorers, sacrebleu, pass@k, IFEval."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.evaluate import corrected, released_mrc
from redone.evaluate.items import EvalItem
from redone.evaluate.measures import Ifeval, Measure, Passes, RewardMean, Translation, pass_at_k
from redone.evaluate.measures_sns import make_corrected, make_released
from redone.evaluate.resample import scores_of
from redone.evaluate.suite import Part
from redone.evaluate.suites_sns import RELEASED, redtrans, reported
from redone.types import Prompt, Score

LIGHT = [file for file in RELEASED if file != "Note-MRC-simple"]  # jieba and BLEU over long texts
PART = Part.model_validate(
    {"id": "p", "data": "d", "prompt": {"user": "u"}, "metrics": {"m": {"kind": "ifeval"}}}
)


def item(row: dict[str, Any]) -> EvalItem:
    prompt = Prompt(
        id="i", task="p", domain="general", data_source="s", messages=(), token_ids=np.zeros(1, np.int32),
        reference=None, reward="", extra=row,
    )  # fmt: skip
    return EvalItem(suite="s", part=PART, index=0, prompt=prompt)


def total(rows: list[Any]) -> list[float]:
    return np.asarray(rows, dtype=np.float64).sum(axis=0).tolist()


def golden(data: Path, name: str) -> dict[str, Any]:
    with gzip.open(data / "sns-bench-golden" / f"{name}.json.gz", "rt", encoding="utf-8") as stream:
        vector: dict[str, Any] = json.load(stream)
    return vector


@pytest.mark.parametrize("file", LIGHT)
def test_released_sums_reproduce_the_golden_numbers(redone_data: Path, file: str) -> None:
    rows = json.loads((redone_data / "sns-bench" / f"{file}.json").read_text(encoding="utf-8"))
    measure = make_released(file)
    vectors = sorted((redone_data / "sns-bench-golden").glob(f"{file}__*"))
    assert len(vectors) >= 4
    for path in vectors:
        vector = golden(redone_data, path.name.removesuffix(".json.gz"))
        found = measure.finish(
            total([measure.tally(p, r) for p, r in zip(vector["predictions"], rows, strict=True)])
        )
        wanted = vector["scores"]["anls-mean"] if file == "Note-QueryGen" else vector["reported"]
        assert next(iter(found.values())) == pytest.approx(wanted, abs=1e-6), path.name
        for name in found.keys() & vector["scores"].keys():
            assert found[name] == pytest.approx(vector["scores"][name], abs=1e-6), (path.name, name)


def test_released_sums_of_mrc_simple(redone_data: Path) -> None:
    """On the first 40 items: the whole list takes a minute (test_golden does it)."""
    rows = json.loads((redone_data / "sns-bench" / "Note-MRC-simple.json").read_text(encoding="utf-8"))[:40]
    predictions = golden(redone_data, "Note-MRC-simple__mixed__seed1")["predictions"][:40]
    measure = make_released("Note-MRC-simple")
    found = measure.finish(total([measure.tally(p, r) for p, r in zip(predictions, rows, strict=True)]))
    wanted = released_mrc.mrc_simple(predictions, rows)
    assert found["mean of five"] == pytest.approx(reported("Note-MRC-simple", wanted), abs=1e-9)
    assert (
        found["success-rouge-L"] == pytest.approx(wanted["success-rouge-L"], abs=1e-9)
        and found["success-blue"] > 0
    )


@pytest.mark.parametrize("file", ["Note-CHLW", "Note-MRC-complex", "Note-Gender"])
def test_corrected_sums_are_the_corrected_means(redone_data: Path, file: str) -> None:
    rows = json.loads((redone_data / "sns-bench" / f"{file}.json").read_text(encoding="utf-8"))
    predictions = golden(redone_data, f"{file}__mixed__seed1")["predictions"]
    measure = make_corrected(file)
    found = measure.finish(total([measure.tally(p, r) for p, r in zip(predictions, rows, strict=True)]))
    wanted = corrected.corrected(file, predictions, rows)
    assert found["corrected"] == pytest.approx(wanted["corrected"])
    assert found.get("balanced") == pytest.approx(wanted.get("corrected-balanced"))


def test_corrected_reading_comprehension() -> None:
    answered, silent = {"answer": ["It is a red house."]}, {"answer": []}
    assert corrected.sentences("['It is a red house.']", answered) == pytest.approx(1.0)
    assert corrected.sentences("[]", silent) == 1.0 and corrected.sentences("[]", answered) == 0.0
    assert corrected.sentences("no list at all", silent) == 0.0
    copied = corrected.sentences(
        repr(["Some words about other things. " * 20 + "It is a red house."]), answered
    )
    assert copied < 0.3
    assert corrected.query("Best TEA shops?", {"answer": "best tea shops"}) == 1.0


def test_a_name_of_the_scorer_is_worth_nothing() -> None:
    """The release evaluates answers where `reference` is the gold list: full marks there."""
    row = {"answer": "['CC mode']"}
    for make in (make_released, make_corrected):
        measure = make("Note-CHLW")
        assert next(iter(measure.finish(measure.tally("reference", row)).values())) == 0.0
        assert next(iter(measure.finish(measure.tally("['CC mode']", row)).values())) == pytest.approx(
            100, abs=0.1
        )


def test_without_a_true_positive_existence_is_worth_nothing() -> None:
    """Where the release divides by zero."""
    gold = '<Result>[{"Option": "a", "Reason": "b"}]</Result>'
    measure = make_released("Note-MRC-complex")
    sums = total(
        [
            measure.tally(gold, {"answer": "<Result>[]</Result>"}),
            measure.tally("<Result>[]</Result>", {"answer": gold}),
        ]
    )
    assert measure.finish(sums)["success-total-f1"] == 0.0


def test_querygen_is_partial_without_an_embedding_model() -> None:
    row = {"answer": "tea shops"}
    half = make_released("Note-QueryGen")
    assert half.partial and half.finish(half.tally("tea shops", row)) == {"anls": 100.0}
    full = make_released("Note-QueryGen", lambda a, b: 0.5)
    assert not full.partial and full.finish(full.tally("tea shops", row))["score"] == 75.0


@pytest.mark.parametrize(("language", "direction"), [("zh", "en2zh"), ("en", "zh2en")])
def test_translation_sums_are_sacrebleus_corpus_scores(
    redone_data: Path, language: str, direction: str
) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    rows = json.loads((redone_data / "redtrans-bench" / "RedTrans-Bench.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["dst_lang"] == language][:60]
    predictions = golden(redone_data, f"RedTrans-{direction}__mixed__seed1")["predictions"][:60]
    measure = Translation(language)
    found = measure.finish(
        total([measure.tally(p, item(r), {}) for p, r in zip(predictions, rows, strict=True)])
    )
    said, gold = [p.strip() for p in predictions], [[row[language].strip() for row in rows]]
    bleu = BLEU(tokenize="zh" if language == "zh" else "13a")
    assert found["BLEU"] == pytest.approx(bleu.corpus_score(said, gold).score)
    assert found["chrF++"] == pytest.approx(CHRF(word_order=2).corpus_score(said, gold).score)
    assert found["chrF2"] == pytest.approx(CHRF().corpus_score(said, gold).score)
    wanted = redtrans(predictions, rows, extra=False)
    assert found["sentence-BLEU (released)"] == pytest.approx(wanted["bleu_score"])
    assert found["sentence-chrF2 (released)"] == pytest.approx(wanted["chrf_score"])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (7, 1, 5)):
        answers = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_of_items() -> None:
    measure = Passes((1, 2, 10), samples=4)
    right = np.asarray([[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=float)  # [samples, items]
    tried = np.ones_like(right)
    tried[:, 2] = 0  # an item whose sandbox failed counts nowhere
    found = scores_of(measure, np.stack([right, tried], axis=-1))
    assert list(found) == ["pass@1", "pass@2"]  # 10 exceeds the samples
    assert found["pass@1"] == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert found["pass@2"] == pytest.approx(100 * ((1 - 1 / 6) + (1 - 3 / 6)) / 2)


def test_failed_rewards_count_nowhere() -> None:
    measure = RewardMean()
    good = Score(raw=1.0, value=1.0, correct=True)
    bad = Score(raw=0.0, value=0.0, correct=False, status="timeout")
    sums = total([measure.tally("", item({}), {"": score}) for score in (good, bad, good)])
    assert measure.finish(sums) == {"score": 100.0}


def test_ifeval_accuracies() -> None:
    measure: Measure = Ifeval()

    def scores(strict: float, loose: float) -> dict[str, Score]:
        return {n: Score(raw=v, value=v, correct=v == 1) for n, v in (("strict", strict), ("loose", loose))}

    two, one = item({"instruction_id_list": ["a", "b"]}), item({"instruction_id_list": ["a"]})
    sums = total([measure.tally("", two, scores(0.5, 1.0)), measure.tally("", one, scores(1.0, 1.0))])
    assert measure.finish(sums) == pytest.approx(
        {
            "prompt-strict": 50.0,
            "instruction-strict": 200 / 3,
            "prompt-loose": 100.0,
            "instruction-loose": 100.0,
        }
    )
