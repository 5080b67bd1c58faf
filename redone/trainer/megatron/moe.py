"""Routing for RL: replayed expert choices, token multiplicity in the balancing loss, expert load.

A token of a shared prompt stands for as many tokens of the unshared batch as responses follow it, so the
balancing loss and the counts weigh it so; padding weighs nothing. Choices are set through Megatron's
RouterReplay by a hook before every layer, which has the packed row at hand: so recomputed layers and
interleaved micro-batches repeat their own choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from redone.trainer.megatron import context
from redone.trainer.megatron.attention import PackedRow
from redone.types import RouteArray


class PackedRouter(TopKRouter):
    """Megatron's top-k router over a packed row. `load`: [E] fp64 tokens per expert since `take_load`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_of_tokens: Tensor | None = None  # [T / (cp tp)] fp32
        self.load = torch.zeros(self.num_experts, dtype=torch.float64)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, chosen = super().routing(logits, *args, **kwargs)
        if self.training and torch.is_grad_enabled():  # once per micro-batch, recomputation or not
            weight = self.weight_of_tokens
            assert weight is not None
            self.load += (chosen * weight[:, None]).sum(0).to("cpu", torch.float64)
        return probs, chosen

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """The Switch loss of the unshared micro-batch: every token counts `weight_of_tokens` times."""
        coeff = self.get_aux_loss_coeff("aux_loss")
        weight = self.weight_of_tokens
        if coeff == 0:
            return probs
        assert weight is not None
        counts = torch.cat([(routing_map * weight[:, None]).sum(0), weight.sum()[None]])
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss * weight[:, None],
            tokens_per_expert=counts[:-1],
            total_num_tokens=counts[-1].clamp(min=1.0),
            topk=self.topk,
            num_experts=self.num_experts,
            moe_aux_loss_coeff=coeff,
        )
        return self.attach_and_log_load_balancing_loss(
            probs, coeff, loss, "load_balancing_loss", self.tp_cp_group
        )


def watch_layers(module: torch.nn.Module) -> None:
    """Give every router of `module` its part of the row before its layer runs."""
    for layer in module.decoder.layers:  # type: ignore[union-attr]
        layer.register_forward_pre_hook(_prepare, with_kwargs=True)


def _prepare(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    router, row = layer.mlp.router, kwargs.get("packed_seq_params")
    assert isinstance(row, PackedRow) and row.token_weight is not None
    router.weight_of_tokens = _own_rows(row.token_weight)
    replay: RouterReplay | None = router.router_replay
    if replay is None:
        return
    if row.routes is not None:
        replay.target_topk_idx = _own_rows(row.routes)[:, layer.layer_number - 1].to(torch.int64)
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    elif row.record:
        replay.set_router_replay_action(RouterReplayAction.RECORD)
    else:
        replay.clear_router_replay_action()


def _own_rows(x: Tensor) -> Tensor:
    """This tensor-parallel rank's part of the context rank's [T, ...] (sequence parallelism)."""
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return x if size == 1 else x.chunk(size)[rank]


def routers(modules: Sequence[torch.nn.Module]) -> list[PackedRouter]:
    return [m for module in modules for m in module.modules() if isinstance(m, PackedRouter)]


def recorded_routes(module: torch.nn.Module) -> dict[int, RouteArray]:
    """Layer (from 0) -> [T, K] choices of the whole row that `module` just ran.

    Collective over tensor and context ranks.
    """
    found = {}
    for router in routers([module]):
        assert router.router_replay is not None and router.layer_number is not None
        indices = router.router_replay.get_recorded_indices()
        assert indices is not None
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size > 1:
            parts = [torch.empty_like(indices) for _ in range(size)]
            dist.all_gather(
                parts, indices.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
            )
            indices = torch.cat(parts)
        indices = context.join_tokens(indices)
        found[router.layer_number - 1] = indices.to("cpu", torch.int16).numpy()
    return found


def join_stages(rows: Sequence[dict[int, RouteArray]], layers: int) -> list[RouteArray] | None:
    """rows[m]: this stage's layers of micro-batch m -> [T, L, K] per micro-batch, on the last stage.

    Collective over the pipeline stages of a replica.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, list(rows), group=group)
    if not parallel_state.is_pipeline_last_stage():
        return None
    joined = []
    for parts in zip(*everyone, strict=True):
        by_layer = {layer: route for part in parts for layer, route in part.items()}
        joined.append(np.stack([by_layer[layer] for layer in range(layers)], axis=1))
    return joined


def load_metrics(modules: Sequence[torch.nn.Module], layers: int) -> dict[str, float]:
    """Expert load since the last call, over all ranks; collective.

    moe/load_max: tokens of the busiest expert / mean, mean over layers; moe/load_max_layer: of the worst
    layer; moe/idle_experts: share of (layer, expert) pairs without a token.
    """
    mine = routers(modules)
    counts = torch.zeros(layers, mine[0].num_experts if mine else 1, dtype=torch.float64)
    for router in mine:
        assert router.layer_number is not None
        counts[router.layer_number - 1] += router.load
        router.load.zero_()
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = counts.to(where)
    dist.all_reduce(counts)
    total = counts.sum(1)
    if not bool((total > 0).all()):
        return {}
    busiest = counts.amax(1) / (total / counts.shape[1])
    return {
        "moe/load_max": float(busiest.mean()),
        "moe/load_max_layer": float(busiest.max()),
        "moe/idle_experts": float((counts == 0).double().mean()),
    }


def take_aux_loss(config: TransformerConfig) -> float:
    """Balancing loss of the last step, mean over layers and micro-batches; 0 where it is off. Collective."""
    if config.moe_router_load_balancing_type != "aux_loss":
        return 0.0
    reduce_aux_losses_tracker_across_ranks()
    values = get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"]
    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    # Megatron scales by the context size, because it averages gradients over those ranks too.
    factor = 1.0 if scale is None else scale.to(values.device) / context.place()[1]
    found = float((values * factor).sum() / config.num_layers)
    clear_aux_losses_tracker()
    return found
