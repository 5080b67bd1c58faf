"""Build the GPT model of this rank: config from the model's shape, packed-row positions, our head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from redone.config.schema import OptimConfig, TrainerConfig
from redone.layout import Llama3Rope, ModelShape, padded_vocab
from redone.trainer.megatron.attention import PackedRow
from redone.trainer.megatron.device import device, on_cpu
from redone.trainer.megatron.head import Head
from redone.trainer.megatron.moe import watch_layers
from redone.trainer.megatron.specs import HAVE_TE, block_spec


class PackedRotary(RotaryEmbedding):
    """Rotary table gathered by position.

    GPTModel hands its packed parameters to `get_rotary_seq_len` on every pipeline stage, and whatever that
    returns to `forward`: so there is no global state, and recomputation is safe.
    """

    def rescale(self, rope: Llama3Rope) -> None:
        """Before the first use."""
        self.inv_freq = self._apply_scaling(
            self.inv_freq,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_positions,
        )

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> PackedRow:
        packed = kwargs.get("packed_seq_params", args[4] if len(args) > 4 else None)
        assert isinstance(packed, PackedRow)
        return packed

    def forward(self, packed: PackedRow, *args: Any, **kwargs: Any) -> Tensor:
        """[T, 1, 1, head_dim] angles."""
        assert packed.positions is not None and packed.max_seqlen_q is not None
        return self.get_emb(packed.max_seqlen_q).index_select(0, packed.positions)


class PackedGPTModel(GPTModel):
    """GPTModel over packed rows; the last stage returns what the head returns."""

    def __init__(self, config: TransformerConfig, head: Head, **kwargs: Any) -> None:
        super().__init__(config, position_embedding_type="rope", parallel_output=True, **kwargs)
        self.head = head
        self.rotary_pos_emb = PackedRotary(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=kwargs["rotary_base"],
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedRow | None = None, **kwargs: Any
    ) -> Any:
        if not self.post_process:
            return hidden_states
        row = packed_seq_params
        assert row is not None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        # Its forward is never called; with overlap_param_gather these hooks wait for its weight.
        for hook in tuple(getattr(self.output_layer, "_forward_pre_hooks", {}).values()):
            hook(self.output_layer, ())
        return self.head(hidden_states, weight, row)


def _leave_uninitialised(tensor: Tensor) -> Tensor:
    """The weights are loaded next.

    perform_initialization=False would be wrong: Megatron then does not mark the sharded parameters, and the
    gradient norm counts them on one rank only.
    """
    return tensor


def dispatcher_options(trainer: TrainerConfig) -> dict[str, Any]:
    """Megatron's "flex" dispatcher drives DeepEP's kernels."""
    backend = trainer.moe.dispatcher
    if backend == "alltoall":
        return {"moe_token_dispatcher_type": "alltoall"}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}


def fp8_options(trainer: TrainerConfig) -> dict[str, Any]:
    """e5m2 gradients with scales per tensor; e4m3 throughout with scales per block."""
    return {"fp8": "e4m3" if trainer.fp8 == "blockwise" else "hybrid", "fp8_recipe": trainer.fp8}


def transformer_config(shape: ModelShape, trainer: TrainerConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's config of `shape`. Fusions need CUDA kernels of optional packages and are off."""
    options: dict[str, Any] = {}
    parallel = trainer.parallel
    if parallel.virtual_pipeline > 1:
        options |= dict(
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            microbatch_group_size_per_vp_stage=parallel.pipeline,
            batch_p2p_comm=False,  # batched, the two directions between two stages would be confused
            overlap_p2p_comm=not on_cpu(),
        )
    if shape.num_experts:
        options |= dict(
            num_moe_experts=shape.num_experts,
            moe_router_topk=shape.experts_per_token,
            moe_ffn_hidden_size=shape.moe_ffn,
            moe_router_load_balancing_type=trainer.moe.load_balancing,
            moe_aux_loss_coeff=trainer.moe.aux_loss_coeff
            if trainer.moe.load_balancing == "aux_loss"
            else 0.0,
            moe_router_dtype="fp32" if trainer.moe.router_fp32 else None,
            moe_enable_routing_replay=trainer.moe.routing_replay != "off",
            moe_router_pre_softmax=not shape.norm_topk_prob,
            moe_grouped_gemm=True,
        )
    if trainer.fp8 != "off":
        options |= fp8_options(trainer)
    if trainer.recompute == "full":
        options |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif trainer.recompute == "selective":
        options |= dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        variable_seq_lengths=parallel.virtual_pipeline == 1,  # see step._for_interleaving
        **dispatcher_options(trainer),  # dense models too: Megatron checks it with variable_seq_lengths
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **options,
    )


def build_modules(
    shape: ModelShape, config: TransformerConfig, trainer: TrainerConfig
) -> list[PackedGPTModel]:
    """This rank's chunks of the model, uninitialised, on its device, not wrapped; several with virtual
    pipeline stages."""
    chunks = trainer.parallel.virtual_pipeline
    return [_build_chunk(shape, config, trainer, i if chunks > 1 else None) for i in range(chunks)]


def _build_chunk(
    shape: ModelShape, config: TransformerConfig, trainer: TrainerConfig, vp_stage: int | None
) -> PackedGPTModel:
    tp = config.tensor_model_parallel_size
    head = Head(
        backend=trainer.head.backend,
        chunk=trainer.head.chunk_tokens,
        vocab=shape.vocab,
        sequence_parallel=config.sequence_parallel,
        fuse_loss=trainer.head.fuse_loss,
        own_wgrad=not trainer.optim.overlap_grad_reduce,
    )
    module = PackedGPTModel(
        config,
        head,
        transformer_layer_spec=block_spec(config, HAVE_TE and not on_cpu(), vp_stage),
        vocab_size=padded_vocab(shape.vocab, tp),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        rotary_base=shape.rope_theta,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        vp_stage=vp_stage,
    )
    if shape.rope_scaling is not None:
        module.rotary_pos_emb.rescale(shape.rope_scaling)
    if shape.num_experts:
        watch_layers(module)
    for parameter in module.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return module.to(device())


def wrap(
    modules: Sequence[PackedGPTModel], config: TransformerConfig, optim: OptimConfig
) -> list[DistributedDataParallel]:
    """Mixed precision and data parallelism around each chunk; gradients are summed in fp32."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
    )
    models = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp,
            module=Float16Module(config, module) if config.bf16 else module,
            disable_bucketing=i > 0,
        )
        for i, module in enumerate(modules)
    ]
    if optim.overlap_grad_reduce:  # all micro-batches but the last
        config.no_sync_func = [m.no_sync for m in models] if len(models) > 1 else models[0].no_sync
    return models


def unwrap(module: Any) -> PackedGPTModel:
    """The model inside Megatron's wrappers."""
    while not isinstance(module, PackedGPTModel):
        module = module.module
    return module
