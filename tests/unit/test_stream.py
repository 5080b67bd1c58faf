from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from redone.data.stream import PromptStream, sampling_seed
from redone.errors import DataError, RunFolderError
from redone.types import Message, Prompt


def prompts(n: int, labels: str = "abc") -> list[Prompt]:
    return [
        Prompt(
            id=f"p{i}",
            task="t",
            domain="sns",
            data_source="t",
            messages=(Message(role="user", content=str(i)),),
            token_ids=np.array([i], dtype=np.int32),
            reference=labels[i % len(labels)],
            reward="t",
            extra={"level": 0 if i < n - 2 else 1},
        )
        for i in range(n)
    ]


def names(drawn) -> list[tuple[int, str]]:
    return [(epoch, prompt.id) for epoch, prompt in drawn]


def test_every_epoch_holds_every_prompt_once_in_another_order():
    stream = PromptStream(prompts(10), seed=3)
    drawn = names(stream.take(30))
    epochs = [[i for e, i in drawn if e == epoch] for epoch in range(3)]
    assert all(sorted(order) == sorted(f"p{i}" for i in range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(set(drawn)) == 30
    assert drawn != names(PromptStream(prompts(10), seed=4).take(30))


def test_order_is_independent_of_batching_and_file_order():
    whole = names(PromptStream(prompts(10), seed=3).take(25))
    parts = PromptStream(list(reversed(prompts(10))), seed=3)
    assert [x for n in (1, 7, 12, 5) for x in names(parts.take(n))] == whole


def test_without_shuffle_the_order_is_the_files():
    drawn = names(PromptStream(prompts(3), seed=0, shuffle=False).take(4))
    assert drawn == [(0, "p0"), (0, "p1"), (0, "p2"), (1, "p0")]


@pytest.mark.parametrize("key", [None, "reference", "level"])
def test_the_cursor_resumes_exactly(key):
    stream = PromptStream(prompts(11), seed=5, balance_key=key)
    stream.take(17)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = names(stream.take(40))
    again = PromptStream(prompts(11), seed=5, balance_key=key)
    again.load_state_dict(state)
    assert names(again.take(40)) == expected
    assert again.state_dict() == stream.state_dict()


def test_a_cursor_of_other_data_is_refused():
    state = PromptStream(prompts(11), seed=5).state_dict()
    for other in (
        PromptStream(prompts(12), seed=5),
        PromptStream(prompts(11), seed=6),
        PromptStream(prompts(11), seed=5, shuffle=False),
        PromptStream(prompts(11), seed=5, balance_key="reference"),
    ):
        with pytest.raises(RunFolderError, match="other data"):
            other.load_state_dict(state)


def test_balance_draws_the_values_in_turn():
    rare = prompts(20, labels="aaaaaaaaab")  # 18 a, 2 b
    stream = PromptStream(rare, seed=1, balance_key="reference")
    drawn = stream.take(40)
    assert [p.reference for _, p in drawn] == ["a", "b"] * 20
    assert len(set(names(drawn))) == 40  # a rare value repeats, but in another epoch of its own
    assert Counter(p.id for _, p in drawn if p.reference == "b") == {"p9": 10, "p19": 10}
    levels = PromptStream(prompts(10), seed=1, balance_key="level").take(6)
    assert [p.extra["level"] for _, p in levels] == [0, 1] * 3


def test_bad_streams():
    with pytest.raises(DataError, match="no training prompts"):
        PromptStream([], seed=0)
    with pytest.raises(DataError, match="balance_key=topic"):
        PromptStream(prompts(3), seed=0, balance_key="topic")
    with pytest.raises(DataError, match="ids repeat"):
        PromptStream([*prompts(3), *prompts(1)], seed=0)


def test_sampling_seeds_are_stable_and_distinct():
    # a literal: another value would break the resume of every existing run
    assert sampling_seed(0, 0, "p0", 0) == 1303398711
    seeds = {
        sampling_seed(run, epoch, f"p{i}", sample)
        for run in range(2)
        for epoch in range(3)
        for i in range(20)
        for sample in range(16)
    }
    assert len(seeds) == 2 * 3 * 20 * 16
    assert all(0 <= seed < 2**31 for seed in seeds)
