"""The residual stream of this rank's layers, read with forward hooks: what the engine's is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from redone.trainer.megatron import context
from redone.types import FloatArray, Shard
from redone.weights.layers import EMBEDDING, FINAL_NORM, attention_point, gate_point, mlp_point


def residual_streams(
    modules: Sequence[Any], shard: Shard, forward: Callable[[], object], sequence_parallel: bool
) -> dict[str, FloatArray] | None:
    """Run `forward` over a shard of one sequence; collective over tensor- and context-parallel ranks.

    Returns:
        point (redone.weights.layers) -> [tokens, hidden] fp32 of this pipeline stage's layers (gates
        [tokens, 1]); None on ranks that repeat others or whose shard is padding.
    """
    kept: dict[str, Tensor] = {}
    handles = [handle for module in modules for handle in _watch(module, kept)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if sequence_parallel:
        kept = {point: gather_from_sequence_parallel_region(stream) for point, stream in kept.items()}
    kept = {point: context.join_tokens(stream) for point, stream in kept.items()}
    tokens = [m for m in shard.microbatches if len(m.rows)]
    first = parallel_state.get_tensor_model_parallel_rank() == 0 and context.place()[0] == 0
    if not tokens or not first:
        return None
    length = int((tokens[0].token_weight > 0).sum())
    return {point: s[:length, 0].float().cpu().numpy() for point, s in kept.items()}


def _watch(module: Any, kept: dict[str, Tensor]) -> list[Any]:
    def keep(point: str, stream: Tensor) -> None:
        if point not in kept:  # an interleaved schedule may add padding after the sequence
            kept[point] = stream.detach().clone()

    def first_input(point: str) -> Callable[..., None]:
        return lambda module, args: keep(point, args[0])

    def first_output(point: str) -> Callable[..., None]:
        return lambda module, args, output: keep(point, output[0])

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        keep(EMBEDDING, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def routed(point: str) -> Callable[..., None]:
        def margin(router: Any, args: Any) -> None:
            best = router.gating(args[0]).float().topk(router.topk + 1).values
            keep(point, best[..., -2:-1] - best[..., -1:])

        return margin

    handles: list[Any] = []
    for layer in module.decoder.layers:
        index = layer.layer_number - 1
        if index == 0:
            handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        # Called with the stream between attention and MLP, also where it is an identity.
        handles.append(layer.pre_mlp_layernorm.register_forward_pre_hook(first_input(attention_point(index))))
        handles.append(layer.register_forward_hook(first_output(mlp_point(index))))
        router = getattr(layer.mlp, "router", None)
        if router is not None and router.topk < router.config.num_moe_experts:
            handles.append(router.register_forward_pre_hook(routed(gate_point(index))))
    final = module.decoder.final_layernorm
    if isinstance(final, torch.nn.Module):
        handles.append(final.register_forward_hook(lambda m, args, output: keep(FINAL_NORM, output)))
    return handles
