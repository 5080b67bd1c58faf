"""Further functions of worker.py: routing replay, token multiplicity, checks that must fail."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import worker
from worker import Layout

from redone.config.schema import AlgorithmConfig, SftLoss
from redone.data.pack import scatter_routes
from redone.data.sft import Example, sft_batch
from redone.errors import TrainerError
from redone.types import Batch


def replay(kind: str, layout: Layout) -> dict[str, float]:
    """Routes of the old-log-probability pass, another router, then the pass again with and without them."""
    batch = worker.load_reference(kind)["batches"][0]
    trainer = worker.make_trainer(worker.model_folder(kind), layout)
    plan, shard = worker.shard_of(trainer, batch)
    found = trainer.logprobs_and_routes(shard, 1.0)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (trainer.describe()["dp_rank"], found))
    by_rank = {d: r for d, r in everyone if r is not None}
    routes = [by_rank[d][1] for d in sorted(by_rank)]
    routed = scatter_routes(batch, plan, routes)
    before = worker.gather_logprobs(trainer, batch)
    same = worker.max_diff(before, worker.gather_logprobs(trainer, routed))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(trainer.exporter.parameters.items()):
            noise = 0.3 * torch.randn(p.shape, generator=generator)
            if "router" in name:
                p += noise
    free, kept = (worker.gather_logprobs(trainer, b) for b in (batch, routed))
    trainer.close()
    return {
        "same": same,
        "moved": worker.max_diff(before, free),
        "free_to_kept": worker.max_diff(free, kept),
        "prompt_rows": float(routed.groups[0].prompt_routes.shape[0]),
    }


def resharded(kind: str, save_layout: Layout, load_layout: Layout, dtype: str) -> dict[str, Any]:
    """Two steps, a checkpoint, loaded at another layout and saved there: what differs between the two."""
    from megatron.core.dist_checkpointing import load_common_state_dict, load_plain_tensors

    batches = worker.load_reference(kind)["batches"][:2]
    paths = [str(worker.FOLDER / f"resharded-{save_layout[1]}-{i}") for i in range(2)]
    trainer = worker.make_trainer(worker.model_folder(kind), save_layout, dtype=dtype)
    for batch in batches:
        trainer.update(worker.shard_of(trainer, batch)[1], trainer.cfg.algorithm)
    trainer.save(paths[0])
    trainer.close()
    trainer = worker.make_trainer(worker.model_folder(kind), load_layout, dtype=dtype)
    trainer.load(paths[0])
    trainer.save(paths[1])
    trainer.close()
    first, second = ({k: t for k, t in load_plain_tensors(p).items() if torch.is_tensor(t)} for p in paths)
    states = [name for name in first if name.startswith("optimizer.state") and "experts" in name]
    optimizer = load_common_state_dict(paths[1])["optimizer"]
    parts = [optimizer] if "optimizer" in optimizer else list(optimizer.values())
    return {
        "differing": [
            name for name in first if not torch.equal(first[name], second.get(name, first[name][:0]))
        ],
        "extra": sorted(set(second) - set(first)),
        "expert_states": {name: float(first[name].abs().max()) for name in states},
        "dtypes": sorted({str(first[name].dtype) for name in states}),
        "steps": [float(g["step"]) for part in parts for g in part["optimizer"]["param_groups"]],
        "optimizers": len(parts),
    }


def shard_with(trainer: Any, batch: Batch) -> Any:
    return worker.shard_of(trainer, batch)[1]


def routed_gradients(kind: str, layout: Layout, **options: Any) -> dict[str, Any]:
    """Gradients under random given routes: this layout and cut against one plain rank-local reference cut."""
    data = worker.load_reference(kind)
    batch = with_random_routes(data["batches"][0], layers=LAYERS, experts=8, k=2)
    found = []
    for own in (options, {"sharing": False, "budget": 400}):
        trainer = worker.make_trainer(worker.model_folder(kind), layout, **own)
        from redone.trainer.megatron import optim
        from redone.trainer.megatron.step import forward_backward

        optim.zero_grad(trainer.models, trainer.optimizer)
        totals = forward_backward(trainer.models, shard_with(trainer, batch), trainer.cfg.algorithm, 1.0)
        found.append((totals.loss, worker.full_gradients(trainer)))
        trainer.close()
    result: dict[str, Any] = {"loss": abs(found[0][0] - found[1][0]), "value": found[0][0]}
    result["free"] = abs(found[0][0] - data["loss"])
    if dist.get_rank() == 0:
        result |= worker.relative_errors(found[0][1], found[1][1])
    return result


def two_layouts(
    kind: str, layouts: tuple[Layout, Layout], change: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Loss, metrics and gradients of a step at two layouts with as many data-parallel replicas."""
    from redone.trainer.megatron import moe, optim
    from redone.trainer.megatron.step import forward_backward

    batch, found = worker.load_reference(kind)["batches"][0], []
    for layout in layouts:
        trainer = worker.make_trainer(worker.model_folder(kind), tuple(layout), **options)
        optim.zero_grad(trainer.models, trainer.optimizer)
        algorithm = AlgorithmConfig.model_validate(trainer.cfg.algorithm.model_dump() | (change or {}))
        totals = forward_backward(trainer.models, shard_with(trainer, batch), algorithm, 1.0)
        metrics = totals.metrics() | ({"aux": moe.take_aux_loss(trainer.config)} if "moe" in options else {})
        found.append((totals.loss, worker.full_gradients(trainer), metrics))
        trainer.close()
    ours, theirs = found
    assert sorted(ours[2]) == sorted(theirs[2])
    result: dict[str, Any] = {"loss": ours[0], "difference": abs(ours[0] - theirs[0])}
    result["metrics"] = max(abs(ours[2][k] - v) / max(1.0, abs(v)) for k, v in theirs[2].items())
    if dist.get_rank() == 0:
        result |= worker.relative_errors(ours[1], theirs[1])
    return result


def options(**_: Any) -> dict[str, Any]:
    """What the keys that need CUDA set in Megatron's own configurations, and what is missing here."""
    from megatron.core.optimizer import OptimizerConfig

    from redone.config.schema import OptimConfig, TrainerConfig
    from redone.layout import ModelShape
    from redone.trainer.megatron import model, optim
    from redone.trainer.megatron.packages import missing
    from redone.trainer.megatron.step import row_multiple

    def trainer(**keys: Any) -> TrainerConfig:
        return TrainerConfig.model_validate(keys)

    shapes = [
        ModelShape.from_hf(json.loads((worker.model_folder(kind) / "config.json").read_text()))
        for kind in ("dense", "moe")
    ]
    found: dict[str, Any] = {}
    for recipe in ("delayed", "tensorwise", "blockwise"):
        cfg = trainer(fp8=recipe, parallel={"tensor": 2, "context": 2})
        built = model.transformer_config(shapes[0], cfg, torch.bfloat16)
        found[recipe] = [
            built.fp8,
            str(getattr(built.fp8_recipe, "value", built.fp8_recipe)),
            row_multiple(built),
        ]
    for name in ("alltoall", "deepep", "hybridep"):
        built = model.transformer_config(shapes[1], trainer(moe={"dispatcher": name}), torch.bfloat16)
        found[name] = [
            built.moe_token_dispatcher_type,
            built.moe_flex_dispatcher_backend,
            built.moe_grouped_gemm,
        ]
    keys = {"cpu_offload": 0.25, "precision_aware": True, "moments_dtype": "bfloat16"}
    fields = optim.memory_options(OptimConfig.model_validate(keys))
    # Megatron's constructor compares TransformerEngine's version where states are below fp32.
    host = {k: v for k, v in fields.items() if "offload" in k or "cpu" in k}
    made = dataclasses.asdict(OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, **host))
    found["optimizer"] = {name: str({**made, **fields}[name]) for name in fields}
    found["unknown"] = sorted(set(fields) - set(made))
    found["missing"] = missing(
        trainer(fp8="delayed", optim={"precision_aware": True}, moe={"dispatcher": "deepep"})
    )
    found["nothing missing"] = missing(trainer(optim={"cpu_offload": 1.0}))
    return found


LAYERS = 4


def with_random_routes(batch: Batch, layers: int, experts: int, k: int) -> Batch:
    rng = np.random.default_rng(5)

    def draw(rows: int) -> np.ndarray:
        return np.argsort(rng.random((rows, layers, experts)), axis=2)[:, :, :k].astype(np.int16)

    groups = []
    for group in batch.groups:
        trajectories = tuple(
            dataclasses.replace(t, routes=draw(len(t.token_ids))) for t in group.trajectories
        )
        groups.append(
            dataclasses.replace(group, prompt_routes=draw(len(group.prompt_ids)), trajectories=trajectories)
        )
    return dataclasses.replace(batch, groups=tuple(groups))


def balanced(kind: str, layout: Layout, sabotage: bool = False, **options: Any) -> dict[str, Any]:
    """The balancing loss with shared against unshared prompts, one micro-batch each: every gradient, and the
    expert counts. `sabotage`: every token weighs 1."""
    from redone.trainer.megatron import moe, optim
    from redone.trainer.megatron.step import forward_backward

    data, found = worker.load_reference(kind), []
    balancing = {"load_balancing": "aux_loss", "aux_loss_coeff": 0.1}
    for sharing in (True, False):
        trainer = worker.make_trainer(
            worker.model_folder(kind), layout, moe=balancing, sharing=sharing, budget=400, **options
        )
        optim.zero_grad(trainer.models, trainer.optimizer)
        shard = shard_with(trainer, data["batches"][0])
        assert len(shard.microbatches) == 1
        if sabotage and sharing:
            flat = dataclasses.replace(
                shard.microbatches[0], token_weight=np.sign(shard.microbatches[0].token_weight)
            )
            shard = dataclasses.replace(shard, microbatches=(flat,))
        forward_backward(trainer.models, shard, trainer.cfg.algorithm, 1.0)
        counts = []
        for router in moe.routers(trainer.modules):
            load = router.load.clone()
            dist.all_reduce(load)  # sequence parallelism: every rank counts its own rows
            counts.append((router.layer_number, load.tolist()))
        aux = moe.take_aux_loss(trainer.config)
        found.append((worker.full_gradients(trainer), counts, aux))
        trainer.close()
    result: dict[str, Any] = {"counts": found[0][1] == found[1][1], "aux": abs(found[0][2] - found[1][2])}
    result["aux_value"] = found[0][2]
    if dist.get_rank() == 0:
        result |= worker.relative_errors(found[0][0], found[1][0])
        result["without"] = worker.relative_errors(found[0][0], data["gradients"])["worst"]
    return result


def sft_sharing(kind: str, layout: Layout) -> dict[str, Any]:
    """Supervised conversations with common beginnings: computed once against each on its own."""
    from redone.trainer.megatron import optim
    from redone.trainer.megatron.step import forward_backward

    rng, found = np.random.default_rng(7), []

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, 90, length).astype(np.int32)

    starts = [ids(9), ids(6)]
    examples = [
        Example(
            id=str(i), task="t", prompt_ids=np.concatenate([starts[i % 2], ids(2)]), response_ids=ids(4),
            loss_mask=np.array([True, True, i % 3 > 0, True]),
        )
        for i in range(6)
    ]  # fmt: skip
    for share in (True, False):
        trainer = worker.make_trainer(worker.model_folder(kind), layout, budget=64)
        optim.zero_grad(trainer.models, trainer.optimizer)
        algorithm = AlgorithmConfig(loss=SftLoss())
        shard = shard_with(trainer, sft_batch(examples, share))
        totals = forward_backward(trainer.models, shard, algorithm, 1.0)
        tokens = sum(len(m.token_ids) for m in shard.microbatches)
        found.append((totals.loss, worker.full_gradients(trainer), tokens))
        trainer.close()
    result: dict[str, Any] = {"loss": found[0][0], "difference": abs(found[0][0] - found[1][0])}
    result["tokens"] = [tokens for _, _, tokens in found]
    if dist.get_rank() == 0:
        result |= worker.relative_errors(found[0][1], found[1][1])
    return result


def controls(kind: str, layout: Layout) -> dict[str, Any]:
    """What must make parity and the self-check fail: a sibling visible, a wrong row, a shifted position."""
    from redone.trainer.megatron import attention, step

    data = worker.load_reference(kind)
    trainer = worker.make_trainer(worker.model_folder(kind), layout)
    batch, expected = data["batches"][0], data["logprobs"]
    result: dict[str, Any] = {}
    original, pack_row = attention.make_plan, step.pack_row

    def shares(segments: Any) -> bool:
        return any(len(s.responses) > 1 for s in segments)

    def siblings(segments: Any, *place: Any) -> Any:
        joined = [
            dataclasses.replace(s, responses=((s.responses[0][0], sum(n for _, n in s.responses)),))
            if s.responses
            else s
            for s in segments
        ]
        return original(joined, *place)

    def wrong_row(*args: Any, **kwargs: Any) -> Any:
        row = pack_row(*args, **kwargs)
        if shares(row.plan.segments):
            row.rows[1] = row.rows[0]
        return row

    def shifted(microbatch: Any, *args: Any, **kwargs: Any) -> Any:
        moved = worker._shifted(microbatch, 1) if shares(microbatch.segments) else microbatch
        return pack_row(moved, *args, **kwargs)

    for name, target, value in (
        ("good", "pack_row", pack_row),
        ("sibling", "make_plan", siblings),
        ("row", "pack_row", wrong_row),
        ("position", "pack_row", shifted),
    ):
        kept = getattr(step, target)
        setattr(step, target, value)
        result[name] = worker.max_diff(worker.gather_logprobs(trainer, batch), expected)
        trainer.checked = False
        update = functools.partial(trainer.update, shard_with(trainer, batch), trainer.cfg.algorithm)
        result[f"check {name}"] = worker._message(TrainerError, update)
        setattr(step, target, kept)
        if name == "good":
            trainer.close()
            trainer = worker.make_trainer(worker.model_folder(kind), layout)
    trainer.close()
    return result


def context_shares(size: int) -> dict[str, list[int]]:
    """See attention_check.py."""
    from attention_check import shares

    return shares(size)


def meta(model: str) -> dict[str, Any]:
    """See meta_check.py."""
    from meta_check import build

    return build(model)


def publish(kind: str, layout: Layout) -> dict[str, Any]:
    """The published bytes are the weights; digests and buckets cover all of them."""
    from redone.weights.digest import digest

    data = worker.load_reference(kind)
    trainer = worker.make_trainer(worker.model_folder(kind), layout)
    plan = trainer.weight_plan(100_000)
    location = str(worker.FOLDER / f"channel-{kind}-{'-'.join(map(str, layout))}")
    buckets = list(trainer.publish(location, 7))
    result: dict[str, Any] = {"published": bool(buckets), "rank": dist.get_rank()}
    if buckets:
        raw = torch.from_numpy(np.fromfile(location, np.uint8))
        wrong = []
        digests = [d for b in buckets for d in b.digests]
        for meta, expected in zip(plan.tensors, digests, strict=True):
            part = raw[meta.offset : meta.offset + meta.nbytes].clone()
            same = torch.equal(part.view(torch.float32).view(meta.shape), data["initial"][meta.name])
            if not same or digest(part) != expected:
                wrong.append(meta.name)
        result |= {"wrong": wrong, "buckets": len(buckets), "versions": [b.version for b in buckets]}
        result["names"] = sorted(m.name for m in plan.tensors) == sorted(data["initial"])
    trainer.close()
    return result


def ratio(kind: str, layout: Layout) -> dict[str, float]:
    """Metrics of one update: tokens saved, expert load."""
    trainer = worker.make_trainer(worker.model_folder(kind), layout)
    batch = worker.load_reference(kind)["batches"][0]
    report = trainer.update(shard_with(trainer, batch), trainer.cfg.algorithm)
    trainer.close()
    return {k: v for k, v in report.metrics.items() if k.startswith(("prefix/", "moe/"))}


def sleeping(kind: str, layout: Layout, **options: Any) -> dict[str, Any]:
    """With and without trainer.offload; see sleep_check.py."""
    import sleep_check

    return sleep_check.sleeping(kind, layout, **options)
