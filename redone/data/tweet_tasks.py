"""Eight small tasks over all reward families, for the three-stage quickstart: five on real tweets.

Prompts carry example turns: without them SmolLM2-135M answers no item of any of these tasks. Splits of tweets
are those of tweets.py; procedural items are disjoint between splits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from redone.data.tweets import EXAMPLES, SYSTEM, Split, Tweet, label_of, split_of

SPLITS: tuple[Split, ...] = ("train", "val", "test")
Item = tuple[str, Any, dict[str, Any]]  # user text, ground truth, extra_info

DOMAINS = {
    "sentiment": "sns", "topic": "sns", "hashtags": "sns", "clean": "sns", "reply": "sns",
    "code": "general", "sort": "general", "add": "general",
}  # fmt: skip
CAPABILITIES = {
    "sentiment": "content understanding", "topic": "content understanding", "hashtags": "extraction",
    "clean": "rewriting", "reply": "dialogue", "code": "code", "sort": "reasoning", "add": "reasoning",
}  # fmt: skip
# Of 16 prompts of an RL step, how many are a task's: `extra_info.balance` cycles through that many values.
TURNS = {"sentiment": 3, "topic": 2, "hashtags": 2, "clean": 2, "reply": 2, "code": 1, "sort": 2, "add": 2}
# What a task's prompts share ends soon after a block of 32 tokens: on a CPU vLLM caches whole blocks only.
PROMPTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "sentiment": (SYSTEM["sentiment"], EXAMPLES["sentiment"]),
    "topic": (SYSTEM["topic"], EXAMPLES["topic"]),
    "hashtags": (
        "Copy the hashtags of the tweet, in order, nothing else.",
        (("Great day! #sun #fun", "#sun #fun"), ("So #tired of @Bob", "#tired")),
    ),
    "clean": (
        "Copy only the words of the tweet, without @names and without #hashtags.",
        (("@Bob great day! #sun", "great day!"), ("why so late @Ann", "why so late")),
    ),
    "reply": (
        "Reply as the help desk. One short and polite sentence: "
        "first the @name, then the answer, last #help.",
        (("@Bob my bag is lost!", "@Bob We are sorry about your bag. #help"),),
    ),
    "code": (
        "Write a Python lambda f of t.",
        (
            ("gives t in upper case", "```python\nf = lambda t: t.upper()\n```"),
            ("is True when t ends with 'x'", "```python\nf = lambda t: t.endswith('x')\n```"),
        ),
    ),
    "sort": ("Sort the numbers from small to large.", (("9 41 7", "7 9 41"), ("35 12 80", "12 35 80"))),
    "add": ("Answer with the number only.", (("2 + 3", "5"), ("14 + 7", "21"), ("30 + 8", "38"))),
}
WORDS = (
    "flight", "love", "hate", "thanks", "delay", "service", "happy", "late", "music", "car", "phone", "game",
    "time", "bad", "great", "bag", "gate", "team", "show", "day", "seat", "price", "crew", "help", "sick",
    "news",
)  # fmt: skip


def task_rows(
    tweets: Sequence[Tweet],
    sizes: dict[Split, int],
    seed: int,
    special: Mapping[tuple[str, Split], int],
) -> dict[Split, list[dict[str, Any]]]:
    """Rows in verl's format, at most sizes[split] of every task, or special[task, split]."""
    shuffled = list(tweets)
    random.Random(seed).shuffle(shuffled)
    found: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for task in PROMPTS:
        own = {split: special.get((task, split), sizes[split]) for split in SPLITS}
        pools = _pools(task, shuffled, own, seed)
        for split in SPLITS:
            chosen = _balanced(pools[split], own[split])
            found[split] += [_row(task, split, i, item) for i, item in enumerate(chosen)]
    return found


def _pools(task: str, tweets: Sequence[Tweet], sizes: dict[Split, int], seed: int) -> dict[Split, list[Item]]:
    pools: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    if task in TWEET_ITEMS:
        for tweet in tweets:
            item = TWEET_ITEMS[task](tweet)
            if item is not None:
                pools[split_of(tweet.text)].append(item)
        return pools
    items = list(dict.fromkeys(_procedural(task, random.Random(f"{seed}/{task}"))))
    shown = {question for question, _ in PROMPTS[task][1]}  # the prompt holds their answers
    made = [(text, *_solved(task, text)) for text in items if text not in shown]
    # Small closed pools (code, add): the test split first, then validation, the rest trains.
    start = 0
    for split in ("test", "val", "train"):
        share = (
            sizes[split]
            if split == "train"
            else min(sizes[split], len(made) // (3 if split == "test" else 10))
        )
        pools[split] = made[start : start + share]  # type: ignore[index]
        start += share
    return pools


def _sentiment(tweet: Tweet) -> Item | None:
    label = label_of(tweet, "sentiment")
    return None if label is None else (tweet.text, label, {"label": label})


def _topic(tweet: Tweet) -> Item | None:
    label = label_of(tweet, "topic")
    return None if label is None else (tweet.text, label, {"label": label})


def _hashtags(tweet: Tweet) -> Item | None:
    tags = re.findall(r"#\w+", tweet.text)
    plain = re.fullmatch(r"[\w@#.,!?'\" :;/&()-]+", tweet.text)
    if not (plain and 1 <= len(tags) <= 3 and len({t.casefold() for t in tags}) == len(tags)):
        return None
    return tweet.text, " ".join(tags), {}


def _clean(tweet: Tweet) -> Item | None:
    rest = " ".join(re.sub(r"[@#]\w+:?", "", tweet.text).split()).strip(" -:,;.")
    plain = re.fullmatch(r"[\w@#.,!?' ]+", tweet.text)
    marked = "@" in tweet.text or "#" in tweet.text
    if not (plain and marked and 3 <= len(rest.split()) <= 9 and len(tweet.text) < 75):
        return None
    return tweet.text, rest, {}


def _reply(tweet: Tweet) -> Item | None:
    names = re.findall(r"@\w+", tweet.text)
    if len(names) != 1 or not tweet.text.startswith("@") or tweet.sentiment != "negative":
        return None
    pattern = re.escape(names[0]) + r"(?= )(?=.{8,90}$)[^#@\n]*[a-z]{2,}[^#@\n]* #help"
    check = {"kind": "regex", "args": {"pattern": pattern, "full": True, "dotall": False}}
    return tweet.text, names[0], {"checks": [check]}


TWEET_ITEMS: dict[str, Callable[[Tweet], Item | None]] = {
    "sentiment": _sentiment, "topic": _topic, "hashtags": _hashtags, "clean": _clean, "reply": _reply,
}  # fmt: skip


def _procedural(task: str, draw: random.Random) -> Iterator[str]:
    for _ in range(6000):
        if task == "sort":
            yield " ".join(map(str, draw.sample(range(1, 100), 3)))
        elif task == "add":
            yield f"{draw.randrange(2, 100)} + {draw.randrange(1, 10)}"
        else:
            word, n = draw.choice(WORDS), draw.randrange(3, 90)
            yield draw.choice([
                f"is True when t contains '{word}'", f"is True when t starts with '{word}'",
                f"counts '{word}' in t", f"removes '{word}' from t", f"is True when t is longer than {n}",
                f"gives the first {n} characters of t",
            ])  # fmt: skip


def _solved(task: str, text: str) -> tuple[Any, dict[str, Any]]:
    """(ground truth, extra_info)."""
    if task == "sort":
        return " ".join(sorted(text.split(), key=int)), {}
    if task == "add":
        return str(sum(int(n) for n in text.split(" + "))), {}
    return _tests(text)


def _tests(text: str) -> tuple[Any, dict[str, Any]]:
    """Tests of a code item, and its solution as the answer to imitate."""
    word = text.split("'")[1] if "'" in text else "x"
    n = int("".join(c for c in text if c.isdigit()) or 0)
    known: dict[str, tuple[str, Callable[[str], Any]]] = {
        "contains": (f"'{word}' in t", lambda t: word in t),
        "starts": (f"t.startswith('{word}')", lambda t: t.startswith(word)),
        "counts": (f"t.count('{word}')", lambda t: t.count(word)),
        "removes": (f"t.replace('{word}', '')", lambda t: t.replace(word, "")),
        "longer": (f"len(t) > {n}", lambda t: len(t) > n),
        "first": (f"t[:{n}]", lambda t: t[:n]),
    }
    expression, solve = known[next(kind for kind in known if kind in text)]
    inputs = [f"{word} on time", f"so {word} and {word}", "nothing here", "y" * n, "y" * (n + 1)]
    tests = [f"assert f({i!r}) == {solve(i)!r}" for i in inputs]
    return tests, {"response": f"```python\nf = lambda t: {expression}\n```"}


def _balanced(pool: Sequence[Item], size: int) -> list[Item]:
    """Labels in turn, as many of each as the rarest allows; without labels the first `size`."""
    by_label: dict[str, list[Item]] = {}
    for item in pool:
        by_label.setdefault(str(item[2].get("label", "")), []).append(item)
    each = min(size // len(by_label), *(len(v) for v in by_label.values())) if by_label else 0
    return [by_label[label][i] for i in range(each) for label in sorted(by_label)]


def _row(task: str, split: Split, index: int, item: Item) -> dict[str, Any]:
    text, truth, extra = item
    system, examples = PROMPTS[task]
    turns = [{"role": "system", "content": system}]
    for question, answer in examples:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rest = dict(extra)
    response = rest.pop("response", None)
    row = {
        "data_source": f"quickstart_{task}",
        "task": task,
        "domain": DOMAINS[task],
        "prompt": [*turns, {"role": "user", "content": text}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {
            **rest, "split": split, "index": index, "capability": CAPABILITIES[task],
            "balance": f"{task}-{index % TURNS[task]}",
        },
    }  # fmt: skip
    return row if response is None else {**row, "response": response}
