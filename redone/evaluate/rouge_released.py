"""ROUGE-L as the `rouge` package counts it (1.0.1, summary level, distinct words), without its table.

The package keeps the words of ONE longest common subsequence of every pair of sentences, so which of several
equally long ones it walks along decides the score; the walk here takes the same turns. It reads the lengths
from rows of bits (Crochemore et al. 2001; Hyyrö 2004) instead of a dictionary of all cells.
"""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-8  # the package's


def rouge_l(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """F of two texts given as jieba's tokens, cut into sentences at full stops as the package does.

    Raises ValueError where it does: a side without a sentence.
    """
    found, wanted = sentences(hypothesis), sentences(reference)
    if not found or not wanted:
        raise ValueError("ROUGE-L: one side has no sentence")
    common = {word for gold in wanted for text in found for word in common_words(gold, text)}
    precision = len(common) / len({word for text in found for word in text})
    recall = len(common) / len({word for gold in wanted for word in gold})
    return 2.0 * (precision * recall / (precision + recall + EPSILON))


def sentences(tokens: Sequence[str]) -> list[list[str]]:
    """Words of each part between full stops; a part of blanks alone holds one empty word."""
    parts = " ".join(tokens).split(".")
    return [" ".join(part.split()).split(" ") for part in parts if part]


def common_words(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The longest common subsequence of x and y that goes left in y unless going up in x is longer."""
    rows = rises(x, y)
    i, j = len(x), len(y)
    found: list[str] = []
    here = (rows[i] & ((1 << j) - 1)).bit_count()  # length for x[:i], y[:j]
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j, here = i - 1, j - 1, here - 1
            continue
        up = (rows[i - 1] & ((1 << j) - 1)).bit_count()
        left = here - (rows[i] >> (j - 1) & 1)
        if up > left:
            i, here = i - 1, up
        else:
            j, here = j - 1, left
    return found


def rises(x: Sequence[str], y: Sequence[str]) -> list[int]:
    """rows[i]: bit j is set iff the length for x[:i], y[:j + 1] is one more than for x[:i], y[:j]."""
    places: dict[str, int] = {}
    for j, word in enumerate(y):
        places[word] = places.get(word, 0) | 1 << j
    everything = (1 << len(y)) - 1
    flat, rows = everything, [0]  # flat: the complement of the rises
    for word in x:
        hits = flat & places.get(word, 0)
        flat = ((flat + hits) | (flat - hits)) & everything
        rows.append(flat ^ everything)
    return rows
