"""The 25 instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911) as checkers: text and arguments -> bool.

Argument names and readings are the published ones, odd ones included (keywords are regular expressions, a
bold section counts twice). Where they need nltk's trained Punkt model, which is a download, an untrained one
with common English abbreviations stands in. An unknown language counts as followed, as published.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

Args = Mapping[str, Any]
Checker = Callable[[str, Args], bool]
ABBREVIATIONS = (
    *(
        "dr",
        "mr",
        "mrs",
        "ms",
        "prof",
        "st",
        "jr",
        "sr",
        "inc",
        "ltd",
        "co",
        "corp",
        "vs",
        "etc",
        "e.g",
        "i.e",
    ),
    *("a.m", "p.m", "u.s", "no", "dept", "est", "fig", "gen", "hon", "rev", "col", "sgt", "capt", "ph.d"),
)
# The published patterns begin with ^\s*, quadratic on many empty lines; these count the same.
STARS = re.compile(r"^[^\S\n]*\*[^*].*$", re.MULTILINE)
DASHES = re.compile(r"^[^\S\n]*-.*$", re.MULTILINE)
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def holds(count: int, relation: str | None, limit: int) -> bool:
    """`less than`, else at least."""
    return count < limit if relation == "less than" else count >= limit


def search(pattern: str, text: str) -> bool:
    return re.search(pattern, text, flags=re.IGNORECASE) is not None


@lru_cache(maxsize=1)
def _splitter() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def count_sentences(text: str) -> int:
    """Sentences of English text, or of Chinese text by its full-width stops."""
    return len(_splitter().tokenize(re.sub(r"([。！？]+[”’」』）]*)", _ascii_stop, text)))


def _ascii_stop(found: re.Match[str]) -> str:
    return found[1].translate({0x3002: ".", 0xFF01: "!", 0xFF1F: "?"}) + " "


def count_words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def capital_words(text: str) -> int:
    """Words in capitals, as nltk's word tokeniser cuts them (DON'T is two)."""
    return sum(word.isupper() for word in _word_tokenizer().tokenize(text))


@lru_cache(maxsize=1)
def _word_tokenizer() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


@lru_cache(maxsize=1024)
def language_of(text: str) -> str | None:
    """ISO 639-1 code (zh-cn, zh-tw apart), None when there is too little text. The same for the same text."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


def response_language(text: str, args: Args) -> bool:
    return language_of(text) in (None, args["language"])


def number_sentences(text: str, args: Args) -> bool:
    return holds(count_sentences(text), args.get("relation"), args["num_sentences"])


def number_words(text: str, args: Args) -> bool:
    return holds(count_words(text), args.get("relation"), args["num_words"])


def number_placeholders(text: str, args: Args) -> bool:
    return count_placeholders(text) >= int(args["num_placeholders"])


def count_placeholders(text: str) -> int:
    """Pairs of brackets in one line, in linear time: 10,000 open ones cost the published pattern a second."""
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1):
            count += 1
    return count


def number_bullet_lists(text: str, args: Args) -> bool:
    return len(STARS.findall(text)) + len(DASHES.findall(text)) == int(args["num_bullets"])


def constrained_response(text: str, args: Args) -> bool:
    return any(answer in text for answer in ANSWERS)


def number_highlighted_sections(text: str, args: Args) -> bool:
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    found = [h.strip("*") for h in single] + [h.removeprefix("**").removesuffix("**") for h in double]
    return sum(bool(h.strip()) for h in found) >= int(args["num_highlights"])


def multiple_sections(text: str, args: Args) -> bool:
    marker = r"\s?" + str(args["section_spliter"]).strip() + r"\s?\d+\s?"
    return len(re.split(marker, text)) - 1 >= int(args["num_sections"])


def number_paragraphs(text: str, args: Args) -> bool:
    """Paragraphs are parted by ***; an empty one is allowed at either end only."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == int(args["num_paragraphs"])


def nth_paragraph_first_word(text: str, args: Args) -> bool:
    paragraphs = text.split("\n\n")
    count = sum(bool(p.strip()) for p in paragraphs)
    nth = int(args["nth_paragraph"])
    if not 1 <= nth <= count or not (paragraph := paragraphs[nth - 1].strip()):
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    first = re.split("[.,?!'\"]", word)[0].lower()
    return count == int(args["num_paragraphs"]) and first == str(args["first_word"]).lower()


def postscript(text: str, args: Args) -> bool:
    marker = str(args["postscript_marker"]).strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, marker.lower()), text.lower(), flags=re.MULTILINE) is not None


def existence(text: str, args: Args) -> bool:
    return all(search(keyword, text) for keyword in args["keywords"])


def frequency(text: str, args: Args) -> bool:
    count = len(re.findall(str(args["keyword"]).strip(), text, flags=re.IGNORECASE))
    return holds(count, args.get("relation"), args["frequency"])


def forbidden_words(text: str, args: Args) -> bool:
    return not any(search(rf"\b{word}\b", text) for word in args["forbidden_words"])


def letter_frequency(text: str, args: Args) -> bool:
    count = Counter(text.lower())[str(args["letter"]).strip().lower()]
    return holds(count, args.get("let_relation"), args["let_frequency"])


def json_format(text: str, args: Args) -> bool:
    value = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        value = value.removeprefix(fence)
    try:
        json.loads(value.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def two_responses(text: str, args: Args) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    answers = [part.strip() for part in parts if part.strip()]
    return len(answers) == 2 and answers[0] != answers[1]


def repeat_prompt(text: str, args: Args) -> bool:
    return text.strip().lower().startswith(str(args["prompt_to_repeat"]).strip().lower())


def end_checker(text: str, args: Args) -> bool:
    return text.strip().strip('"').lower().endswith(str(args["end_phrase"]).strip().lower())


def title(text: str, args: Args) -> bool:
    """In any line, what stands from its first `<<` to its last `>>` holds more than brackets and blanks."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def english_capital(text: str, args: Args) -> bool:
    return text.isupper() and language_of(text) in (None, "en")


def english_lowercase(text: str, args: Args) -> bool:
    return text.islower() and language_of(text) in (None, "en")


def no_comma(text: str, args: Args) -> bool:
    return "," not in text


def capital_word_frequency(text: str, args: Args) -> bool:
    return holds(capital_words(text), args.get("capital_relation"), args["capital_frequency"])


def quotation(text: str, args: Args) -> bool:
    value = text.strip()
    return len(value) > 1 and value[0] == value[-1] == '"'


INSTRUCTIONS: dict[str, Checker] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}


def strict(text: str, checker: Checker, args: Args) -> bool:
    return bool(text.strip()) and checker(text, args)


def loose(text: str, checker: Checker, args: Args) -> bool:
    """Followed by the text as it is, or without its first line, last line, both, and with or without *."""
    lines = text.split("\n")
    cuts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys(cuts + [cut.replace("*", "") for cut in cuts])
    return any(variant.strip() and checker(variant, args) for variant in variants)
