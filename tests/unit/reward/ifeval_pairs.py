"""Constructed answers that follow, or do not follow, each of IFEval's 25 instructions."""

from __future__ import annotations

from typing import Any

EN = "The quick brown fox jumps over the lazy dog near the river bank."
# instruction, arguments, a text that follows it, a text that does not
PAIRS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["fox", "dog"]}, EN, EN.replace("dog", "cat")),
    ("keywords:frequency", {"keyword": "o", "frequency": 3, "relation": "at least"}, EN, "the the"),
    ("keywords:frequency", {"keyword": "o", "frequency": 3, "relation": "less than"}, "the", EN),
    ("keywords:forbidden_words", {"forbidden_words": ["fox"]}, "foxes run", "a Fox runs"),
    (
        "keywords:letter_frequency",
        {"letter": "O", "let_frequency": 4, "let_relation": "at least"},
        EN,
        "oops",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        "a!",
        "a!!",
    ),
    ("language:response_language", {"language": "de"}, "Das ist ein deutscher Satz über das Wetter.", EN),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, f"{EN} {EN}", EN),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, EN, f"{EN} {EN}"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n***\nb"),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        "one two three four",
        "1 2 3",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        "1 2 3",
        "one two three four",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"},
        "a\n\n'elm, tree",
        "elm\n\na",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a] and b"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S more", "Bye.\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a\n**b**"),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSECTION b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, "say it. Yes.", "Yes. Say it."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'x. "That is ALL."', "That is all. x"),
    ("startend:quotation", {}, ' "quoted" ', '"'),
    ("change_case:english_capital", {}, EN.upper(), EN),
    ("change_case:english_lowercase", {}, EN.lower(), EN),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "I am in the USA now",
        "We are in the USA now",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "We are in the USA now",
        "I am in the USA now",
    ),
]

# the same, a text that only the loose reading lets pass; None: leaving lines or asterisks out cannot help
LOOSE: list[tuple[str, dict[str, Any], str | None]] = [
    ("keywords:existence", {"keywords": ["fox", "dog"]}, "f*o*x and do*g"),
    ("keywords:frequency", {"keyword": "o", "frequency": 3, "relation": "less than"}, "o o o\nthe"),
    ("keywords:forbidden_words", {"forbidden_words": ["fox"]}, "About a fox:\nit runs"),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        "a!!\na!",
    ),
    (
        "language:response_language",
        {"language": "de"},
        "This is the answer that you asked me for, in the language that you wanted it to be written in:\n"
        "Das ist ein deutscher Satz.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "One. Two.\nThree",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "intro\n***\na\n***\nb"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "one two three four\n1 2"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"},
        "a\n\n*elm* tree",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, None),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n*P*.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* x\n* a\n* b"),
    ("detectable_format:constrained_response", {}, "My answer is *maybe*."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, None),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SEC*TION* 1\na\nSECTION 2\nb",
    ),
    ("detectable_format:json_format", {}, 'Here it is:\n{"a": 1}'),
    ("detectable_format:title", {}, "<*<A title>>"),
    ("combination:two_responses", {}, "one\n******\ntwo\n******\nthree"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, "Sure:\nSay it. Yes."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "That is all.\nBye!"),
    ("startend:quotation", {}, 'Sure:\n"quoted"'),
    ("change_case:english_capital", {}, f"Sure:\n{EN.upper()}"),
    ("change_case:english_lowercase", {}, f"SURE:\n{EN.lower()}"),
    ("punctuation:no_comma", {}, "Sure, here it is:\nabc"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "I AM HERE\nWe are in the USA now",
    ),
]
