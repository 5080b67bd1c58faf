"""IFEval's 25 instructions: constructed pairs, the loose reading, and agreement with a published package."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ifeval_pairs import EN, LOOSE, PAIRS

from redone.reward.ifeval import (
    ABBREVIATIONS,
    INSTRUCTIONS,
    count_placeholders,
    count_sentences,
    loose,
    strict,
)

IDS = [f"{i}-{pair[0]}" for i, pair in enumerate(PAIRS)]


def test_all_25_instructions_have_pairs() -> None:
    assert len(INSTRUCTIONS) == 25 and {pair[0] for pair in PAIRS} == set(INSTRUCTIONS)
    assert [entry[0] for entry in LOOSE] == list(dict.fromkeys(pair[0] for pair in PAIRS))


@pytest.mark.parametrize(("name", "args", "good", "bad"), PAIRS, ids=IDS)
def test_pairs_strict_and_loose(name: str, args: dict[str, Any], good: str, bad: str) -> None:
    checker = INSTRUCTIONS[name]
    assert strict(good, checker, args) and loose(good, checker, args)
    assert not strict(bad, checker, args) and not loose(bad, checker, args)
    assert not strict("", checker, args) and not strict(" \n", checker, args) and not loose("", checker, args)


@pytest.mark.parametrize(("name", "args", "text"), LOOSE, ids=[entry[0] for entry in LOOSE])
def test_only_the_loose_reading(name: str, args: dict[str, Any], text: str | None) -> None:
    checker = INSTRUCTIONS[name]
    if text is not None:
        assert not strict(text, checker, args) and loose(text, checker, args)
        return
    rng = random.Random(3)  # what strict refuses stays refused when lines or asterisks are left out
    for _ in range(500):
        made = "".join(rng.choices("[]*a\n ", k=rng.randint(0, 16)))
        assert loose(made, checker, args) == strict(made, checker, args), made


def test_loose_reading_drops_first_line_last_line_and_asterisks() -> None:
    no_comma, quoted = INSTRUCTIONS["punctuation:no_comma"], INSTRUCTIONS["startend:quotation"]
    for text in ("Sure, here it is:\nabc", "abc\nI hope, truly", "Sure, yes:\nabc\nBye, then"):
        assert loose(text, no_comma, {}) and not strict(text, no_comma, {})
    assert not loose("a, b\nc, d\ne, f", no_comma, {})
    assert loose('**"abc"**', quoted, {}) and not strict('**"abc"**', quoted, {})
    assert loose('Sure:\n**"abc"**\nBye', quoted, {})


def test_sentences() -> None:
    assert count_sentences("Dr. Smith paid 3.50 dollars. Really?! Yes.") == 3
    assert count_sentences("今天很好。你呢？我也是！") == 3
    assert count_sentences("no stop at all") == 1


PIECES = [
    *(EN, EN.upper(), EN.lower(), "My answer is yes.", "* point one\n* point two", "- dash item"),
    "[name] and [place]",
    *("<<A Title>>", "*highlighted section*", "**bold part**", "P.S. remember this", "P.P.S one more"),
    "SECTION 1",
    *("***", "******", '{"a": 1}', "I live in the USA and IBM said NO.", "Don't do it, Mr. Smith, e.g. now!"),
    *("The weather is good today; isn't it?", "Das Wetter ist heute sehr schön und warm.", "DON'T PANIC!"),
    *("今天天气很好。", "Section 2", "PARAGRAPH 1"),
    *("Is there anything else I can help with?", "No, never."),
]


def answers(rows: list[dict[str, Any]], count: int) -> Iterator[tuple[dict[str, Any], str]]:
    """`count` made-up answers to real prompts: pieces that the instructions ask for, joined at random."""
    rng = random.Random(7)
    for _ in range(count):
        row = rng.choice(rows)
        texts = list(PIECES)
        for args in row["kwargs"]:
            for value in args.values():
                texts += [
                    v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)
                ] * 3
        chosen = [rng.choice(texts) for _ in range(rng.randint(1, 14))]
        text = "".join(piece + rng.choice([" ", "\n", "\n\n", "\n***\n"]) for piece in chosen)
        yield row, rng.choice([text, f'"{text.strip()}"', text.replace(",", ""), text.lower(), text.strip()])


def test_agreement_with_a_published_package(redone_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 answers, every instruction id, strict and loose.

    The package's sentence counter needs nltk's trained Punkt model, a download; an untrained one with our
    abbreviations is put in its place, so for number_sentences the agreement covers all but that model."""
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval import INSTRUCTION_DICT, instructions_util
    from langdetect import DetectorFactory
    from nltk.tokenize import destructive, punkt

    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    splitter = punkt.PunktSentenceTokenizer(parameters)
    words = destructive.NLTKWordTokenizer()
    monkeypatch.setattr(instructions_util, "_get_sentence_tokenizer", lambda: splitter)
    monkeypatch.setattr(
        instructions_util.nltk,
        "word_tokenize",
        lambda text: [w for sentence in splitter.tokenize(text) for w in words.tokenize(sentence)],
    )
    DetectorFactory.seed = 0
    lines = (redone_data / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    different, seen, verdicts = [], set(), []
    for row, text in answers(rows, 1000):
        theirs, _ = evaluate_instructions(
            text, row["instruction_id_list"], row["kwargs"], row["prompt"], INSTRUCTION_DICT
        )
        text = text.strip()  # the package strips every answer first
        for result, args in zip(theirs, row["kwargs"], strict=True):
            checker = INSTRUCTIONS[result.instruction_id]
            ours = strict(text, checker, args), loose(text, checker, args)
            seen.add(result.instruction_id)
            verdicts.append(ours[0])
            if ours != (result.strict_pass, result.loose_pass):
                different.append((result.instruction_id, args, text, ours, result))
    assert seen == set(INSTRUCTIONS) and 0.1 < sum(verdicts) / len(verdicts) < 0.9
    unexplained = [d for d in different if not explained(*d[:3])]
    assert len(different) < 20  # 4 when this was written
    assert unexplained == [], (len(unexplained), unexplained[:3])


def explained(name: str, args: dict[str, Any], text: str) -> bool:
    """Where we differ on purpose: the package draws a random letter for `!` and `#`, and does not see that a
    Chinese full stop ends a sentence."""
    if name == "keywords:letter_frequency":
        return not args["letter"].isalpha()
    return name == "length_constraints:number_sentences" and any(stop in text for stop in "。！？")


# as published: quadratic on the texts of test_long_texts_take_linear_time
PLACEHOLDER, TITLE = re.compile(r"\[.*?\]"), re.compile(r"<<[^\n]+>>")
STARS, DASHES = re.compile(r"^\s*\*[^\*].*$", re.M), re.compile(r"^\s*-.*$", re.M)
PS, PPS = re.compile(r"\s*p\.\s?s\..*$", re.M), re.compile(r"\s*p\.\s?p\.\s?s.*$", re.M)


@settings(max_examples=100)
@given(st.text(alphabet="[]<>*- \n\x0b\u2028aPpSs.", max_size=30))
@example("[a] [p]")
def test_linear_readings_are_the_published_ones(text: str) -> None:
    assert count_placeholders(text) == len(PLACEHOLDER.findall(text))
    found = len(STARS.findall(text)) + len(DASHES.findall(text))
    assert INSTRUCTIONS["detectable_format:number_bullet_lists"](text, {"num_bullets": found})
    titled = any(t.lstrip("<").rstrip(">").strip() for t in TITLE.findall(text))
    assert INSTRUCTIONS["detectable_format:title"](text, {}) == titled
    for marker, pattern in (("P.S.", PS), ("P.P.S", PPS)):
        follows = INSTRUCTIONS["detectable_content:postscript"](text, {"postscript_marker": marker})
        assert follows == bool(pattern.search(text.lower()))
