"""Which layer is named, on made-up residual streams."""

from __future__ import annotations

import numpy as np
import pytest

from redone.weights.layers import expert_tie, first_divergence, point_names, relative_differences
from redone.weights.sync import probe_prompt


def streams(layers: int = 4, tokens: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {p: rng.normal(size=(tokens, 8)).astype(np.float32) for p in point_names(layers)}


def text(trainer: dict[str, np.ndarray], engine: dict[str, np.ndarray], dtype: str = "float32") -> str:
    return first_divergence(relative_differences(trainer, engine), dtype).text()


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("model.embed_tokens", "first diverging layer is model.embed_tokens:"),
        ("model.layers.2.self_attn", r"model.layers.2, attention (input_layernorm, self_attn):"),
        ("model.layers.3.mlp", "model.layers.3, MLP (post_attention_layernorm, mlp):"),
        ("model.norm", "first diverging layer is model.norm:"),
    ],
)
def test_the_first_point_that_differs_is_named(point: str, said: str) -> None:
    ours = streams()
    theirs = {p: s * np.float32(1 + 1e-7) for p, s in ours.items()}
    for later in point_names(4)[point_names(4).index(point) :]:
        theirs[later] = ours[later] + np.float32(0.01)
    assert said in text(ours, theirs)


def test_agreement_everywhere_leaves_the_head() -> None:
    assert "lm_head" in text(streams(), streams())


def test_one_bad_token_of_many_is_enough_and_nan_counts() -> None:
    for bad in (1.0, float("nan")):
        ours, theirs = streams(), streams()
        theirs["model.layers.1.mlp"][4, 3] += np.float32(bad)
        assert "model.layers.1, MLP" in text(ours, theirs)


def test_a_cached_prefix_leaves_the_last_tokens() -> None:
    ours = streams()
    theirs = {p: s[-2:].copy() for p, s in ours.items()}
    assert "lm_head" in text(ours, theirs)
    theirs["model.layers.0.self_attn"][0] += np.float32(1)
    assert "model.layers.0, attention" in text(ours, theirs)


def test_a_tie_explains_what_its_tokens_alone_explain() -> None:
    """Token 4 differs after layer 1's experts; token 2 as well, in the second half."""
    point = "model.layers.1.mlp"
    ours, theirs = streams(), streams()
    theirs[point][4] += 1
    margins = np.full((6, 1), 0.3, np.float32)
    assert expert_tie(point, ours, theirs, "float32") is None, "a dense model has no margins"
    ours[f"{point}.gate"] = margins
    assert expert_tie(point, ours, theirs, "float32") is None, "chosen by far"
    margins[4] = 2e-7
    assert "1 token(s)" in (expert_tie(point, ours, theirs, "float32") or "")
    last = {p: s[-2:] for p, s in theirs.items()}  # behind a cached prefix
    assert "2.0e-07" in (expert_tie(point, ours, last, "float32") or "")
    theirs[point][2] += 1
    assert expert_tie(point, ours, theirs, "float32") is None, "token 2 is no tie"
    margins[2] = np.nan
    assert expert_tie(point, ours, theirs, "float32") is None


def test_bfloat16_allows_its_own_rounding() -> None:
    ours = streams()
    theirs = {p: s * np.float32(1.01) for p, s in ours.items()}
    assert "lm_head" in text(ours, theirs, "bfloat16")
    assert "model.embed_tokens" in text(ours, theirs, "float32")


def test_probe_prompt_leaves_room() -> None:
    assert probe_prompt([[1, 2, 3], [4, 5, 6]], limit=100) == [1, 2, 3, 4, 5, 6]
    assert probe_prompt([[1, 2, 3], [4, 5, 6]], limit=12) == [1, 2, 3, 4]
