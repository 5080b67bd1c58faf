"""Layer specifications: torch modules with TransformerEngine's parameter names, or TransformerEngine.

Parameter names are the same on both sides (linear_qkv.layer_norm_weight, mlp.experts.linear_fc1.weight{i}),
so one name table and one checkpoint format serve CPU and GPU. The TransformerEngine branch has never run on
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from redone.trainer.megatron.attention import SharedPrefixCoreAttention
from redone.trainer.megatron.moe import PackedRouter

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False

# What differs between the megatron-core versions that this file is tested with, 0.16.1 and 0.19.2.
GroupedMLPSubmodules = getattr(experts, "GroupedMLPSubmodules", MLPSubmodules)


def _submodules(spec: Any) -> Any:
    """Of a ModuleSpec, or of the functools.partial that Megatron's own specs hold from 0.17 on."""
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def block_spec(config: TransformerConfig, use_te: bool, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers of one chunk of this pipeline stage; core attention and router are always ours."""
    if not use_te:
        return _torch_block_spec(config, vp_stage)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = SharedPrefixCoreAttention
        if config.num_moe_experts:
            _submodules(layer.submodules.mlp).router = PackedRouter
    return block


def _torch_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    norm = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=SharedPrefixCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    common = dict(self_attention=attention, self_attn_bda=get_bias_dropout_add, mlp_bda=get_bias_dropout_add)
    if config.num_moe_experts:
        grouped = GroupedMLPSubmodules(
            linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear
        )
        mlp = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(
                experts=ModuleSpec(module=TEGroupedMLP, submodules=grouped), router=PackedRouter
            ),
        )
        layer = TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=mlp, **common)
    else:
        dense = MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear)
        layer = TransformerLayerSubmodules(mlp=ModuleSpec(module=MLP, submodules=dense), **common)
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )


def _ones(size: int, config: TransformerConfig) -> torch.nn.Parameter:
    """A norm weight; with sequence parallelism its gradient must be summed over the tensor-parallel ranks."""
    data = torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device())
    weight = torch.nn.Parameter(data)
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(torch.nn.Module):
    """TENorm's stand-in. Megatron's own torch norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _ones(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """TELayerNormColumnParallelLinear's stand-in: RMSNorm, then the column-parallel linear."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _ones(input_size, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(
            F.rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.eps), *args, **kwargs
        )


class _GroupedLinear(torch.nn.Module):
    """TE's grouped linear: parameters weight0 .. weight{E-1}, one GEMM per expert over a split input."""

    axis = 0  # the sharded dimension of a weight [out, in]

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        assert is_expert and not bias
        self.num_gemms, self._groups, self._tp = num_gemms, pg_collection, pg_collection.expt_tp
        shape = [output_size, input_size]
        shape[self.axis] //= self._tp.size()
        for g in range(num_gemms):
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            if config.perform_initialization:
                init_method(weight)
            set_tensor_model_parallel_attributes(weight, True, self.axis, 1)
            weight.allreduce = not config.expert_model_parallel_size > 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{g}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        parts = zip(torch.split(x, m_splits), range(self.num_gemms), strict=True)
        return torch.cat([F.linear(part, getattr(self, f"weight{g}")) for part, g in parts]), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Experts of all ranks form one global tensor per weight, as TE's module stores them."""
        assert metadata is not None
        result: ShardedStateDict = {}
        state = self.state_dict(prefix="", keep_vars=True)
        total, first = self._groups.ep.size() * self.num_gemms, self._groups.ep.rank() * self.num_gemms
        for g in range(self.num_gemms):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + g, total))
            part = make_sharded_tensors_for_checkpoint(
                {f"{g}.weight": state[f"weight{g}"]},
                "",
                {f"{g}.weight": self.axis},
                offsets,
                tp_group=self._tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(part, f"{g}.", prefix)
            result[f"{prefix}weight{g}"] = part[f"{g}.weight"]
        for tensor in result.values():
            tensor.replica_id = (*tensor.replica_id[:2], self._groups.expt_dp.rank())
        return result


class ColumnParallelGroupedLinear(_GroupedLinear):
    axis = 0


class RowParallelGroupedLinear(_GroupedLinear):
    axis = 1
