"""The residual stream inside an engine's worker, read with forward hooks (any model laid out as Llama is).

Hooks see eager execution only: a compiled or graph-captured forward does not call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redone.weights.layers import EMBEDDING, FINAL_NORM, attention_point, mlp_point

Packed = tuple[list[str], int, bytes]  # points, tokens k, fp32 values of [points, k, hidden]


class _Pass:
    """One forward pass over a flat batch of T tokens."""

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids.flatten().tolist()
        self.positions: list[int] = []
        self.streams: dict[str, Tensor] = {}  # point -> [T, hidden]


class StreamCapture:
    """Records every forward pass between construction and close().

    Raises AttributeError when the model has no model.layers, embed_tokens, norm or post_attention_layernorm.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        inner: Any = model.model
        self.passes: list[_Pass] = []
        self._handles: list[Any] = [inner.embed_tokens.register_forward_pre_hook(self._begin)]
        for i, layer in enumerate(inner.layers):
            if not hasattr(layer, "post_attention_layernorm"):
                continue  # another pipeline rank's layer
            self._handles += [
                layer.register_forward_pre_hook(self._entering(i), with_kwargs=True),
                layer.post_attention_layernorm.register_forward_pre_hook(self._sum_of(attention_point(i))),
                layer.register_forward_hook(self._output(mlp_point(i))),
            ]
        self._handles.append(inner.norm.register_forward_hook(self._normed))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: Any, args: Any) -> None:
        self.passes.append(_Pass(args[0]))

    def _entering(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if index == 0:
                values = {
                    **dict(zip(("positions", "hidden_states", "residual"), args, strict=False)),
                    **kwargs,
                }
                self.passes[-1].positions = values["positions"].flatten().tolist()
                self._keep(EMBEDDING, values["hidden_states"], None)

        return hook

    def _sum_of(self, point: str) -> Any:
        # The fused norm adds its input to the residual in place, so the sum is taken before it.
        return lambda module, args: self._keep(point, *args[:2])

    def _output(self, point: str) -> Any:
        return lambda module, args, output: self._keep(point, *output[:2])

    def _normed(self, module: Any, args: Any, output: Any) -> None:
        self._keep(FINAL_NORM, output[0] if isinstance(output, tuple) else output, None)

    def _keep(self, point: str, hidden: Tensor, residual: Tensor | None) -> None:
        if self.passes:
            value = hidden.float() if residual is None else hidden.float() + residual.float()
            self.passes[-1].streams[point] = value.detach().to("cpu", copy=True)

    def of(self, sequence: Sequence[int]) -> Packed | None:
        """The streams of the last tokens of `sequence` that one pass computed; None when no pass did."""
        best: tuple[int, int, _Pass] | None = None
        for one in self.passes:
            for start, position in enumerate(one.positions):
                length = len(sequence) - position
                found = (
                    0 < length <= len(one.token_ids) - start
                    and one.token_ids[start : start + length] == list(sequence[position:])
                    and one.positions[start : start + length] == list(range(position, len(sequence)))
                )
                if found and (best is None or length > best[1]):
                    best = (start, length, one)
        if best is None:
            return None
        start, length, one = best
        stacked = torch.stack([s[start : start + length] for s in one.streams.values()])
        return list(one.streams), length, stacked.contiguous().numpy().tobytes()


class CaptureExtension:
    """Worker methods; plain values only, because they cross processes."""

    _redone_capture: StreamCapture | None = None

    def redone_watch(self) -> str | None:
        """Begin to record; the reason when this model cannot be watched."""
        try:
            self._redone_capture = StreamCapture(self.get_model())  # type: ignore[attr-defined]
        except AttributeError as error:
            return f"the layers of this model cannot be watched: {error}"
        return None

    def redone_streams(self, sequence: list[int]) -> Packed | str:
        """End the recording; the streams of `sequence`, or why there are none."""
        capture, self._redone_capture = self._redone_capture, None
        if capture is None:
            return "redone_streams without redone_watch"
        capture.close()
        found = capture.of(sequence)
        return found or "no forward pass was seen (compiled model? set rollout.engine.enforce_eager=true)"
