"""The Trainer of redone.api on Megatron-core: one object per rank, every method collective."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from redone.api import TrainerPart
from redone.config.schema import AlgorithmConfig, Config
from redone.errors import ConfigError, TrainerError
from redone.layout import check_layout, token_costs
from redone.trainer.megatron import checkpoint, moe, optim, self_check
from redone.trainer.megatron.convert import load_weights, read_shape
from redone.trainer.megatron.device import on_cpu, on_device, prepare
from redone.trainer.megatron.export import Exporter, write_folder
from redone.trainer.megatron.model import build_modules, transformer_config, unwrap, wrap
from redone.trainer.megatron.names import hf_tensors
from redone.trainer.megatron.packages import missing
from redone.trainer.megatron.publish import Publisher
from redone.trainer.megatron.residence import Residence, needs
from redone.trainer.megatron.step import forward_backward, forward_logprobs, row_multiple
from redone.trainer.megatron.streams import residual_streams
from redone.types import FloatArray, Policy, RouteArray, Shard, UpdateReport, WeightBucket, WeightPlan
from redone.weights.open import open_writer
from redone.weights.plan import make_plan
from redone.weights.quantize import quantized_metas

log = logging.getLogger(__name__)


class MegatronTrainer:
    """One rank.

    The learning rate follows rollout steps: the trainer counts its own updates and divides by the updates per
    rollout step that the config implies; `set_lr_step` overrides that count (after short batches).
    """

    def __init__(self, cfg: Config, rank: int, world: int, init_method: str) -> None:
        prepare(cfg.cluster.device)
        torch.set_num_threads(cfg.trainer.num_threads)
        self.cfg, self.rank, self.world = cfg, rank, world
        self.host = urlsplit(init_method).hostname or "127.0.0.1"  # rank 0's
        self.dtype: torch.dtype = getattr(torch, cfg.model.dtype)
        self.shape = read_shape(cfg.model.path)
        if errors := check_layout(cfg.trainer.parallel, world, self.shape) + missing(cfg.trainer):
            raise ConfigError("; ".join(errors))
        if on_cpu() and self.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            log.warning("this CPU emulates bfloat16: model.dtype=float32 is 2 to 3 times as fast")
        self._owns_group = not dist.is_initialized()
        self._join(init_method)
        trainer = cfg.trainer
        self.config = transformer_config(self.shape, trainer, self.dtype)
        RouterReplay.clear_global_router_replay_instances()
        self.modules = build_modules(self.shape, self.config, trainer)
        load_weights(self.modules, self.shape, cfg.model.path)
        self.reference = self._copy_parameters() if cfg.algorithm.kl.coef > 0 else None
        self.models = wrap(self.modules, self.config, trainer.optim)
        self.optimizer = optim.build_optimizer(self.models, self.config, trainer.optim, self.dtype)
        self.residence = Residence(self.models, self.optimizer)
        self.exporter = Exporter(self.modules, self.shape)
        self.saver = checkpoint.Saver(asynchronous=cfg.checkpoint.asynchronous)
        self.checked = not (trainer.prefix_sharing and trainer.self_check)
        self.updates = 0
        self.lr_step: int | None = None
        self.plan: WeightPlan | None = None
        self.publisher: Publisher | None = None

    def _join(self, init_method: str) -> None:
        parallel = self.cfg.trainer.parallel
        virtual = parallel.virtual_pipeline
        if self._owns_group:
            if self.cfg.cluster.nodes == 1:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo" if on_cpu() else "nccl",
                init_method=init_method,
                rank=self.rank,
                world_size=self.world,
                timeout=datetime.timedelta(seconds=self.cfg.trainer.timeout_s),
            )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        )
        model_parallel_cuda_manual_seed(self.cfg.trainer.determinism_seed)

    @on_device
    def describe(self) -> dict[str, Any]:
        """Who this rank is: what the driver needs to cut batches and find outputs."""
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "dp_size": parallel_state.get_data_parallel_world_size(),
            "cp_rank": parallel_state.get_context_parallel_rank(),
            "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
            "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
            "vocab_size": self.shape.vocab,
            "parameters": sum(p.numel() for p in self._parameters()),
            "cost": token_costs(self.shape),
            "row_multiple": row_multiple(self.config),
            "records_routes": self._records_routes,
        }

    @on_device
    @needs("weights")
    def logprobs(self, shard: Shard, policy: Policy, temperature: float) -> list[FloatArray] | None:
        """See redone.api. Raises TrainerError for policy "reference" when algorithm.kl.coef is 0."""
        if policy == "actor":
            return forward_logprobs(self.models, shard, temperature)
        if self.reference is None:
            raise TrainerError("no reference policy is kept: set algorithm.kl.coef > 0")
        optim.settle(self.models)
        self._swap_reference()
        try:
            return forward_logprobs(self.models, shard, temperature)
        finally:
            self._swap_reference()

    @on_device
    @needs("weights")
    def streams(self, shard: Shard) -> dict[str, FloatArray] | None:
        """See redone.api."""
        return residual_streams(
            self.modules,
            shard,
            lambda: forward_logprobs(self.models, shard, 1.0),
            self.config.sequence_parallel,
        )

    @property
    def _records_routes(self) -> bool:
        return bool(self.config.moe_enable_routing_replay and self.shape.num_experts)

    @on_device
    @needs("weights")
    def logprobs_and_routes(
        self, shard: Shard, temperature: float
    ) -> tuple[list[FloatArray], list[RouteArray]] | None:
        """`logprobs` of the actor, and [T, L, K] expert choices per micro-batch, to repeat in updates (R2).

        None on the ranks without output. Raises TrainerError for a dense model and with routing replay off.
        """
        if not self._records_routes:
            raise TrainerError(
                "routes need a mixture-of-experts model and trainer.moe.routing_replay not off"
            )
        per_chunk: dict[int, list[dict[int, RouteArray]]] = {}

        def keep(module: torch.nn.Module) -> None:
            inner = unwrap(module)
            per_chunk.setdefault(inner.vp_stage or 0, []).append(moe.recorded_routes(inner))

        rows = forward_logprobs(self.models, shard, temperature, after=keep)
        count = len(shard.microbatches)
        merged: list[dict[int, RouteArray]] = [{} for _ in range(count)]
        for found in per_chunk.values():
            for target, layers in zip(merged, found[:count], strict=True):
                target |= layers
        routes = moe.join_stages(merged, self.shape.num_layers)
        return None if rows is None or routes is None else (rows, routes)

    @on_device
    @needs("all")
    def update(self, shard: Shard, algorithm: AlgorithmConfig) -> UpdateReport:
        """One optimizer step. Raises TrainerError, before anything changed, when the loss is not finite."""
        # Supervised targets come from no sampler: their distribution is the model's own, at temperature 1.
        temperature = 1.0 if algorithm.loss.type == "sft" else self.cfg.rollout.temperature
        if not self.checked:
            self_check.compare(self.models, shard, temperature, self.dtype)
            self.checked = True
        optim.zero_grad(self.models, self.optimizer)
        totals = forward_backward(self.models, shard, algorithm, temperature)
        lr = optim.learning_rate(self._rollout_step(), self.cfg.trainer.optim, algorithm.total_steps)
        applied, norm = optim.apply(self.optimizer, lr, self.cfg.trainer.optim.weight_decay)
        self.updates += 1
        if self.shape.num_experts:
            totals.maxima |= moe.load_metrics(self.modules, self.shape.num_layers)
            if aux := moe.take_aux_loss(self.config):
                totals.maxima["moe/aux_loss"] = aux
        metrics = {**totals.metrics(), "actor/loss": totals.loss, "actor/grad_norm": norm, "actor/lr": lr}
        return UpdateReport(loss=totals.loss, grad_norm=norm, lr=lr, skipped=not applied, metrics=metrics)

    def set_lr_step(self, step: int) -> None:
        """Rollout step (from 0) whose learning rate the next updates use."""
        self.lr_step = step

    def _rollout_step(self) -> int:
        if self.lr_step is not None:
            return self.lr_step
        algorithm = self.cfg.algorithm
        parts = max(1, algorithm.train_batch_size // algorithm.ppo_mini_batch_size)
        return self.updates // (parts * algorithm.ppo_epochs)

    @on_device
    def weight_plan(self, bucket_bytes: int) -> WeightPlan:
        metas = [(name, self.cfg.model.dtype, shape) for name, shape in hf_tensors(self.shape)]
        if self.cfg.weights.quantization != "none":
            metas = list(quantized_metas(metas))
        self.plan = make_plan(metas, bucket_bytes)
        self.publisher = None
        return self.plan

    @on_device
    def publish(self, location: str, version: int) -> Iterator[WeightBucket]:
        """See redone.api. Rank 0 writes every tensor at its place in the channel."""
        with self.residence.with_("weights"):
            yield from self._publish(location, version)

    def _publish(self, location: str, version: int) -> Iterator[WeightBucket]:
        weights = self.cfg.weights
        optim.settle(self.models)
        if self.publisher is None:
            plan = self.plan or self.weight_plan(weights.bucket_bytes)
            self.publisher = Publisher(
                self.exporter,
                plan,
                weights.delta,
                lambda place: open_writer(self.cfg, place, plan, self.host, self.rank),
                quantize=weights.quantization != "none",
            )
        return self.publisher.publish(location, version, weights.bucket_bytes)

    @on_device
    def publish_again(self, location: str) -> None:
        """See redone.api."""
        assert self.publisher is not None
        self.publisher.publish_again(location)

    @on_device
    @needs("all")
    def save(self, path: str) -> None:
        """With checkpoint.asynchronous the states are copied here and written in a thread."""
        optim.settle(self.models)
        torch.cuda.empty_cache()  # rank 0 gathers the optimizer's states of all replicas
        meta = checkpoint.Meta(updates=self.updates, lr_step=self.lr_step, layout=self._layout())
        self.saver.save(path, self.modules, self.optimizer, meta)

    @on_device
    @needs("all")
    def load(self, path: str) -> None:
        self.saver.wait()
        optim.settle(self.models)
        meta = checkpoint.load(path, self.modules, self.optimizer, self._layout())
        self.updates, self.lr_step = meta.updates, meta.lr_step

    def _layout(self) -> str:
        p = self.cfg.trainer.parallel
        chunks = f" vpp{p.virtual_pipeline}" if p.virtual_pipeline > 1 else ""
        parts = f" cp{p.context}" if p.context > 1 else ""
        dense = f"world{self.world} tp{p.tensor} pp{p.pipeline}"
        return f"{dense} ep{p.expert} etp{p.expert_tensor}{chunks}{parts}"

    @on_device
    @needs("weights")
    def export(self, path: str) -> None:
        self.saver.wait()
        optim.settle(self.models)
        write_folder(self.exporter, self.cfg.model.path, path)

    @on_device
    def hold(self, what: TrainerPart) -> None:
        """See redone.api. On the CPU the same copies are made, and no memory is gained."""
        if self.cfg.trainer.offload:
            if self.residence.held != "none":
                optim.settle(self.models)
            self.residence.become(what)
        elif what == "none" and not on_cpu():  # there the next update would fault the pages in again
            torch.cuda.empty_cache()

    @on_device
    def memory(self) -> dict[str, float]:
        """See redone.api."""
        return self.residence.memory()

    @on_device
    def close(self) -> None:
        """Leave the process group. The trainer cannot be used afterwards."""
        if self.publisher is not None:
            self.publisher.close()
        self.saver.wait()
        # Cycles through C++ are never collected, and with them process groups and their threads would stay:
        # the optimizer's fp32 shards are views of the parameters and hold, through autograd, Megatron's
        # gradient hooks, these the model, its configuration the optimizer; so do the last dispatch's
        # probabilities.
        self.config.grad_scale_func = None
        for layer in (m for module in self.modules for m in module.modules()):
            if isinstance(layer, MoELayer):
                layer.token_dispatcher.probs = None
        parallel_state.destroy_model_parallel()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (p for module in self.modules for p in module.parameters())

    def _copy_parameters(self) -> list[Tensor]:
        return [p.detach().to("cpu", copy=True) for p in self._parameters()]

    @torch.no_grad()
    def _swap_reference(self) -> None:
        """Exchange the model's parameters with the kept copy, one at a time."""
        assert self.reference is not None
        for parameter, kept in zip(self._parameters(), self.reference, strict=True):
            current = parameter.detach().to("cpu", copy=True)
            parameter.copy_(kept)
            kept.copy_(current)
