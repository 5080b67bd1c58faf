"""Where trainer and engine begin to differ: their residual streams, compared point by point.

A point is a place of the model under its Hugging Face name: `model.embed_tokens`, then for every layer the
stream after attention (`model.layers.2.self_attn`) and after the MLP (`model.layers.2.mlp`), then the final
norm (`model.norm`).

A mixture of experts has one more source of differences: where two experts are almost equally good for a
token, rounding chooses. The trainer's streams therefore hold, per layer, by how much every token's choice was
made (`model.layers.2.mlp.gate`), so that such a tie can be told from a fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redone.types import FloatArray

EMBEDDING, FINAL_NORM = "model.embed_tokens", "model.norm"
# Rounding alone stays below this relative difference, two implementations of one model do not agree further.
FLOOR = {"float32": 2e-5, "bfloat16": 5e-2}
# A choice among experts by less than this (router logits) may be rounding's.
TIE = {"float32": 1e-4, "bfloat16": 5e-2}
_LAYER = re.compile(r"(model\.layers\.\d+)\.(self_attn|mlp)$")
_PARTS = {
    "self_attn": "attention (input_layernorm, self_attn)",
    "mlp": "MLP (post_attention_layernorm, mlp)",
}


def attention_point(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def mlp_point(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


def gate_point(layer: int) -> str:
    """[tokens, 1]: how far the last chosen expert's logit is above the first that was not chosen."""
    return f"{mlp_point(layer)}.gate"


def point_names(layers: int) -> list[str]:
    """All points of a model, in the order of computation."""
    inner = [name(i) for i in range(layers) for name in (attention_point, mlp_point)]
    return [EMBEDDING, *inner, FINAL_NORM]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """point: None when every stream agrees, so that only the language-model head is left."""

    point: str | None
    before: float  # largest relative difference at the points before it
    after: float  # relative difference at it

    def text(self) -> str:
        if self.point is None:
            return (
                f"the residual stream agrees up to model.norm (relative difference {self.after:.1e}): what "
                "differs is lm_head"
            )
        match = _LAYER.match(self.point)
        where = f"{match[1]}, {_PARTS[match[2]]}" if match else self.point
        return (
            f"the first diverging layer is {where}: relative difference {self.after:.1e} after it, "
            f"{self.before:.1e} before it"
        )


def relative_differences(
    trainer: Mapping[str, FloatArray], engine: Mapping[str, FloatArray]
) -> dict[str, float]:
    """Per point that both sides have, in the engine's order: the largest |a - b| / |a| over tokens.

    Args:
        trainer: point -> [tokens, hidden] fp32.
        engine: point -> [last k of these tokens, hidden] fp32 (a prefix cache hides the first ones).
    """
    both = [point for point in engine if point in trainer]
    return {point: float(_errors(trainer[point], engine[point]).max()) for point in both}


def _errors(ours: FloatArray, theirs: FloatArray) -> FloatArray:
    """[k] |a - b| / |a| of the last k tokens."""
    exact = ours[-len(theirs) :].astype(np.float64)
    norms = np.linalg.norm(exact, axis=-1)
    errors = np.linalg.norm(exact - theirs, axis=-1) / np.maximum(norms, 1e-30)
    # A NaN compares as smaller than everything; it is the worst possible disagreement.
    return np.where(np.isnan(errors), np.inf, errors)


def expert_tie(
    point: str, trainer: Mapping[str, FloatArray], engine: Mapping[str, FloatArray], dtype: str
) -> str | None:
    """Why the first divergence, at `point`, is no fault, in words; None when it is not explained so.

    It is when every token that differs there had its experts chosen by less than TIE.
    """
    margins = trainer.get(f"{point}.gate")
    if margins is None:
        return None
    errors = _errors(trainer[point], engine[point])
    margin = margins[-len(errors) :, 0][errors > FLOOR[dtype]]
    if not (margin < TIE[dtype]).all():
        return None
    return (
        f"{len(margin)} token(s) differ there, whose experts were chosen by {margin.max():.1e} or less "
        "(router logits): a tie that rounding decides"
    )


def first_divergence(differences: Mapping[str, float], dtype: str) -> Divergence:
    """The first point above what rounding explains; `differences` as relative_differences returns them."""
    floor, before = FLOOR[dtype], 0.0
    for point, difference in differences.items():
        if difference > floor:
            return Divergence(point=point, before=before, after=difference)
        before = max(before, difference)
    return Divergence(point=None, before=before, after=before)
