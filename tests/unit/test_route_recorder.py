"""Which forward pass a token's expert choices are taken from, over every way in which vLLM schedules."""

from __future__ import annotations

import numpy as np
import pytest

from redone.engine.routes import RouteRecorder, Turn

BLOCK = 4


def turn(request: str, start: int, length: int, blocks: list[int], prompt: int = 6) -> Turn:
    return Turn(request=request, start=start, length=length, prompt=prompt, capacity=12, blocks=blocks)


def rows(*values: int) -> np.ndarray:
    """[T, 1, 1]"""
    return np.asarray(values, np.int16)[:, None, None]


def taken(recorder: RouteRecorder, request: str, tokens: int) -> list[int]:
    return recorder.take(request, 0, tokens)[:, 0, 0].tolist()


@pytest.fixture
def recorder() -> RouteRecorder:
    return RouteRecorder(blocks=8, block_size=BLOCK, layers=1, choices=1)


def test_several_requests_in_one_pass(recorder: RouteRecorder) -> None:
    recorder.record([turn("a", 0, 6, [3, 1]), turn("b", 0, 2, [5], prompt=2)], rows(*range(8)))
    recorder.record([turn("b", 2, 1, [5], prompt=2), turn("a", 6, 1, [3, 1])], rows(20, 10))
    assert taken(recorder, "a", 7) == [0, 1, 2, 3, 4, 5, 10]
    assert taken(recorder, "b", 2) == [6, 7]  # a pass too many, behind the stop token, is cut off
    with pytest.raises(KeyError):
        recorder.take("a", 0, 7)


def test_a_prompt_in_chunks(recorder: RouteRecorder) -> None:
    recorder.record([turn("a", 0, 3, [2])], rows(0, 1, 2))
    with pytest.raises(ValueError, match="0 of 3"):
        recorder.take("a", 0, 3)
    recorder.record([turn("a", 0, 3, [2])], rows(0, 1, 2))
    recorder.record([turn("a", 3, 3, [2, 7])], rows(3, 4, 5))
    assert taken(recorder, "a", 6) == [0, 1, 2, 3, 4, 5]


def test_cached_blocks_bring_their_choices(recorder: RouteRecorder) -> None:
    """Also blocks that another request fills in the same pass, whether or not its choices are asked for."""
    silent = Turn(request="s", start=0, length=6, prompt=6, capacity=0, blocks=[4, 5])
    sibling = turn("b", 4, 2, [4, 6])
    recorder.record([sibling, silent], rows(44, 45, 0, 1, 2, 3, 4, 5))
    assert taken(recorder, "b", 6) == [0, 1, 2, 3, 44, 45]
    with pytest.raises(KeyError):
        recorder.take("s", 0, 6)
    recorder.record([turn("c", 4, 2, [4, 7])], rows(54, 55))
    assert taken(recorder, "c", 6) == [0, 1, 2, 3, 54, 55]


def test_what_is_computed_again_keeps_its_own_pass(recorder: RouteRecorder) -> None:
    """Preempted after three sampled tokens (after a weight update, say); its blocks go to another request."""
    recorder.record([turn("a", 0, 6, [0, 1])], rows(0, 1, 2, 3, 4, 5))
    recorder.record([turn("a", 6, 1, [0, 1])], rows(6))
    recorder.record([turn("a", 7, 1, [0, 1])], rows(7))
    recorder.record([turn("b", 0, 6, [0, 1])], rows(*[90] * 6))
    recorder.resume("a", sampled=3)
    recorder.record([turn("a", 0, 9, [2, 3, 4])], rows(*range(100, 109)))
    assert taken(recorder, "a", 9) == [0, 1, 2, 3, 4, 5, 6, 7, 108]


def test_a_discarded_sample_is_computed_again(recorder: RouteRecorder) -> None:
    """Preempted while a pass was under way, whose token was thrown away."""
    recorder.record([turn("a", 0, 6, [0, 1])], rows(0, 1, 2, 3, 4, 5))
    recorder.record([turn("a", 6, 1, [0, 1])], rows(6))
    recorder.resume("a", sampled=1)
    recorder.record([turn("a", 0, 7, [2, 3])], rows(*range(100, 107)))
    assert taken(recorder, "a", 7) == [0, 1, 2, 3, 4, 5, 106]


def test_a_prompt_that_starts_again_before_its_first_token(recorder: RouteRecorder) -> None:
    recorder.record([turn("a", 0, 4, [0])], rows(0, 1, 2, 3))
    recorder.resume("a", sampled=0)
    recorder.record([turn("a", 0, 6, [2, 3])], rows(*range(100, 106)))
    assert taken(recorder, "a", 6) == list(range(100, 106))


def test_forgotten_requests_leave_nothing(recorder: RouteRecorder) -> None:
    recorder.record([turn("a", 0, 6, [0, 1])], rows(*range(6)))
    recorder.forget("a")
    recorder.forget("a")
    with pytest.raises(KeyError):
        recorder.take("a", 0, 1)


def test_tokens_that_were_not_routed_are_an_error(recorder: RouteRecorder) -> None:
    with pytest.raises(RuntimeError, match="5 tokens were routed of 6"):
        recorder.record([turn("a", 0, 6, [0, 1])], rows(*range(5)))
