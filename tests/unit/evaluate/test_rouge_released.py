"""Our ROUGE-L is the package's own number, bit for bit, on any tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge
from rouge.rouge_score import _recon_lcs

from redone.evaluate.rouge_released import common_words, rouge_l

TOKENS = st.lists(
    st.sampled_from(["a", "b", "c", "好", ".", " ", "1.5", "..", "d e"]), min_size=1, max_size=24
)


@given(hypothesis=TOKENS, reference=TOKENS)
def test_equal_to_the_package(hypothesis: list[str], reference: list[str]) -> None:
    try:
        wanted = Rouge(["rouge-l"]).get_scores(" ".join(hypothesis), " ".join(reference))[0]["rouge-l"]["f"]
    except ValueError:
        with pytest.raises(ValueError):
            rouge_l(hypothesis, reference)
    else:
        assert rouge_l(hypothesis, reference) == wanted


def test_the_same_subsequence_of_longer_texts() -> None:
    """Many subsequences are equally long there; the words of the one that is walked decide."""
    random.seed(0)
    for size in (3, 30):
        x, y = ([f"w{random.randrange(size)}" for _ in range(n)] for n in (40, 150))
        assert set(common_words(x, y)) == _recon_lcs(x, y)._ngrams
