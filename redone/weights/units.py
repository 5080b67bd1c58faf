"""Units of a delta update: tensors that an engine must load together or not at all.

An engine fuses tensors of one layer into one parameter (q, k and v; gate and up; all experts), so half of a
layer cannot be left out. A unit is a decoder layer, or a single tensor outside of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from redone.types import TensorMeta, WeightBucket

_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.")


def unit_of(name: str) -> str:
    """`model.layers.3.mlp.gate.weight` -> `model.layers.3.`; `lm_head.weight` -> itself."""
    match = _LAYER.match(name)
    return match[0] if match else name


def to_load(bucket: WeightBucket, tensors: Sequence[TensorMeta], held: int | None) -> list[TensorMeta]:
    """The tensors of a bucket that an engine must load.

    Args:
        tensors: those of the bucket, in plan order.
        held: version that the engine holds completely; None when it holds none.
    """
    if bucket.base is None or bucket.base != held:
        return list(tensors)
    skipped = set(bucket.unchanged)
    return [t for i, t in enumerate(tensors) if i not in skipped]
