"""One rank of the distributed tests: `python worker.py job.json RANK`. Jobs name functions of this file or of
more.py. With REDONE_DUMP_AFTER=SECONDS in the environment a rank that hangs says where; with
REDONE_MEGATRON=VERSION it refuses any other megatron-core."""

from __future__ import annotations

import copy
import dataclasses
import faulthandler
import gc
import json
import os
import pickle
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; only the case of the fused head runs it

import numpy as np
import reference
import torch
import torch.distributed as dist
from groups import check_megatron, close_groups
from redone_kernels import launch

from redone.config.schema import Config
from redone.data.pack import build_shards, plan_step, scatter_rows
from redone.errors import ModelError, RedoneError, TrainerError
from redone.trainer import build_trainer
from redone.types import Batch, Shard

launch.INTERPRET = False
Layout = tuple[int, ...]  # SIZES, without those at the end that are 1
SIZES = ("tensor", "pipeline", "expert", "expert_tensor", "virtual_pipeline", "context")
FOLDER = Path()


def load_reference(kind: str) -> dict[str, Any]:
    return pickle.loads((FOLDER.parent / f"{kind}.pkl").read_bytes())


def model_folder(kind: str) -> Path:
    return FOLDER.parent / kind


def make_config(path: str | Path, layout: Layout, **options: Any) -> Config:
    """options: dtype, head, chunk, recompute, kl, budget, sharing, entropy, moe, self_check, asynchronous,
    optim."""
    return Config.model_validate(
        {
            "model": {"path": str(path), "dtype": options.get("dtype", "float32")},
            "data": {"train": ["unused"]},
            "rewards": {},
            "algorithm": {
                "total_steps": reference.TOTAL,
                **dict.fromkeys(("train_batch_size", "ppo_mini_batch_size"), 1),
                "kl": {"coef": options.get("kl", 0.0)},
                "entropy_coeff": options.get("entropy", 0.0),
            },
            "trainer": {
                "parallel": dict(zip(SIZES, (*layout, 1, 1)[:6], strict=True)),
                "moe": options.get("moe", {}),
                "self_check": options.get("self_check", True),
                "optim": {
                    "lr": reference.LR,
                    "lr_warmup_steps": reference.WARMUP,
                    "lr_decay_style": "cosine",
                    "weight_decay": reference.WEIGHT_DECAY,
                    "clip_grad": reference.CLIP_GRAD,
                    **reference.ADAM,
                }
                | options.get("optim", {}),
                "max_token_len_per_rank": options.get("budget", 48),
                "prefix_sharing": options.get("sharing", True),
                "recompute": options.get("recompute", "none"),
                "offload": options.get("offload", False),
                "head": {"backend": options.get("head", "auto"), "chunk_tokens": options.get("chunk", 7)}
                | {"fuse_loss": options.get("fuse_loss", True)},
                "timeout_s": 120.0,
            },
            "checkpoint": {"asynchronous": options.get("asynchronous", False)},
            "cluster": {"gpus_per_node": dist.get_world_size()},
        }
    )


def make_trainer(path: str | Path, layout: Layout, **options: Any) -> Any:
    close_groups()
    cfg = make_config(path, layout, **options)
    return build_trainer(cfg, dist.get_rank(), dist.get_world_size(), "unused")


def shard_of(trainer: Any, batch: Batch) -> tuple[Any, Shard]:
    info, cfg = trainer.describe(), trainer.cfg.trainer
    plan = plan_step(batch, info["dp_size"], cfg.max_token_len_per_rank, cfg.prefix_sharing)
    return plan, build_shards(batch, plan, info["row_multiple"])[info["dp_rank"]]


def gather_logprobs(trainer: Any, batch: Batch, shift: int = 0, **call: Any) -> list[list[np.ndarray]]:
    """What the driver does: cut, run, join. `shift` sabotages the positions of the responses."""
    plan, shard = shard_of(trainer, batch)
    if shift:
        shard = dataclasses.replace(shard, microbatches=tuple(_shifted(m, shift) for m in shard.microbatches))
    rows = trainer.logprobs(shard, call.get("policy", "actor"), call.get("temperature", 1.0))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (trainer.describe()["dp_rank"], rows))
    by_rank = {d: r for d, r in everyone if r is not None}
    return scatter_rows(batch, plan, [by_rank[d] for d in sorted(by_rank)])


def _shifted(microbatch: Any, shift: int) -> Any:
    positions = microbatch.positions.copy()
    for segment in microbatch.segments:
        for start, length in segment.responses:
            positions[start : start + length] += shift
    return dataclasses.replace(microbatch, positions=positions)


def max_diff(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> float:
    return max(
        float(np.abs(x - y).max()) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def full_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Every gradient under its Hugging Face name, on rank 0.

    The distributed optimizer leaves each data-parallel rank with its own reduced shard of every buffer: join
    the shards, then gather as the exporter gathers weights.
    """
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    groups = [g for m in trainer.models for g in (*m.bucket_groups, *m.expert_parallel_bucket_groups)]
    for group in groups:
        data_parallel = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            shards = shard_buffer(bucket.grad_data, data_parallel.size())
            mine = shards[data_parallel.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=data_parallel)
    exporter = copy.copy(trainer.exporter)
    exporter.parameters = {name: p.main_grad for name, p in exporter.parameters.items()}
    return {n: t.tensor().clone() for n, t in exporter.stream(1 << 20) if t is not None}


def relative_errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The worst |a - b| / |b| over tensors, and its name; exact zeros on both sides agree."""
    assert sorted(ours) == sorted(theirs), set(ours) ^ set(theirs)
    errors = {n: float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)) for n in theirs}
    worst = max(errors, key=lambda n: errors[n])
    return {"worst": errors[worst], "name": worst}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    from redone.trainer.megatron import optim

    optim.settle(trainer.models)
    return {n: t.tensor().clone() for n, t in trainer.exporter.stream(1 << 18) if t is not None}


def parity(kind: str, layout: Layout, shift: int = 0, temperature: float = 1.0, **options: Any) -> float:
    """Largest |trainer - Hugging Face| log-probability."""
    data = load_reference(kind)
    trainer = make_trainer(model_folder(kind), layout, **options)
    ours = gather_logprobs(trainer, data["batches"][0], shift, temperature=temperature)
    trainer.close()
    return max_diff(ours, data["logprobs"] if temperature == 1.0 else data["logprobs_cold"])


def gradients(kind: str, layout: Layout, **options: Any) -> dict[str, Any]:
    """Loss and gathered gradients of one step against Hugging Face."""
    from redone.trainer.megatron import optim
    from redone.trainer.megatron.step import forward_backward

    data = load_reference(kind)
    trainer = make_trainer(model_folder(kind), layout, **options)
    optim.zero_grad(trainer.models, trainer.optimizer)
    plan, shard = shard_of(trainer, data["batches"][0])
    totals = forward_backward(trainer.models, shard, trainer.cfg.algorithm, 1.0)
    ours = full_gradients(trainer)
    result: dict[str, Any] = {"loss": abs(totals.loss - data["loss"]), "microbatches": plan.num_microbatches}
    result["clipfrac"] = totals.metrics()["actor/pg_clipfrac"]
    result["entropy"] = totals.metrics()["actor/entropy"]
    if dist.get_rank() == 0:
        result |= relative_errors(ours, data["gradients"])
    trainer.close()
    return result


def head_parity(kind: str, layout: Layout, **change: Any) -> dict[str, dict[str, float]]:
    """Every head against the reference head; see head_check.py."""
    from head_check import compare

    data = load_reference(kind)
    batch = data["batches"][0].with_logprobs("ref_logprobs", data["logprobs"])
    where, cut = (model_folder(kind), layout), lambda trainer: shard_of(trainer, batch)[1]
    return compare(make_trainer, where, cut, full_gradients, change)


def train(kind: str, layout: Layout, **options: Any) -> dict[str, Any]:
    """Three optimizer steps against Hugging Face + torch AdamW."""
    data = load_reference(kind)
    trainer = make_trainer(model_folder(kind), layout, **options)
    history = []
    for batch in data["batches"]:
        report = trainer.update(shard_of(trainer, batch)[1], trainer.cfg.algorithm)
        history.append((report.loss, report.grad_norm))
    result: dict[str, Any] = {"history": history, "expected": data["history"]}
    ours = weights(trainer)
    if ours:
        result["weights"] = max(float((ours[n] - w).abs().max()) for n, w in data["trained"].items())
        result["moved"] = max(float((ours[n] - w).abs().max()) for n, w in data["initial"].items())
    trainer.close()
    return result


def export(kind: str, layout: Layout) -> dict[str, Any]:
    """Import, export (in three files) and read back with transformers: bit-exact and complete."""
    from redone.trainer.megatron.export import write_folder

    data = load_reference(kind)
    trainer = make_trainer(model_folder(kind), layout)
    target = FOLDER / f"export-{kind}-{'-'.join(map(str, layout))}"
    write_folder(trainer.exporter, model_folder(kind), target, max_shard_bytes=300_000)
    trainer.export(str(target) + "-single")
    result: dict[str, Any] = {}
    if dist.get_rank() == 0:
        loaded = reference.folder_tensors(dict(reference.load_model(target).named_parameters()))
        result["differing"] = [n for n, w in data["initial"].items() if not torch.equal(loaded[n], w)]
        result["missing"] = sorted(set(data["initial"]) ^ set(loaded))
        result["files"] = sorted(p.name for p in target.iterdir())
        result["single"] = sorted(p.name for p in Path(str(target) + "-single").iterdir())
    trainer.close()
    return result


def checkpoint(
    kind: str, save_layout: Layout, load_layout: Layout, steps: int = 2, **options: Any
) -> dict[str, Any]:
    """`steps` steps, save, load in a fresh trainer, the rest: against the uninterrupted Hugging Face run.

    An asynchronous save is followed by one more step, which must not reach the checkpoint.
    """
    data = load_reference(kind)
    path = str(FOLDER / f"checkpoint-{'-'.join(map(str, (*save_layout, *load_layout)))}-{len(options)}")
    trainer = make_trainer(model_folder(kind), save_layout, **options)
    for batch in data["batches"][:steps]:
        trainer.update(shard_of(trainer, batch)[1], trainer.cfg.algorithm)
    trainer.save(path)
    if options:
        trainer.update(shard_of(trainer, data["batches"][0])[1], trainer.cfg.algorithm)
    trainer.close()
    trainer = make_trainer(model_folder(kind), load_layout)
    trainer.load(path)
    for batch in data["batches"][steps:]:
        report = trainer.update(shard_of(trainer, batch)[1], trainer.cfg.algorithm)
    result: dict[str, Any] = {"loss": abs(report.loss - data["history"][2][0]), "lr": report.lr}
    ours = weights(trainer)
    if ours:
        result["weights"] = max(float((ours[n] - w).abs().max()) for n, w in data["trained"].items())
    trainer.close()
    return result


def kept_reference(kind: str, layout: Layout, **options: Any) -> dict[str, float]:
    """Log-probabilities of the reference policy before and after an update, and the actor's change."""
    data = load_reference(kind)
    batch = data["batches"][0]
    trainer = make_trainer(model_folder(kind), layout, kl=0.1, **options)
    before = gather_logprobs(trainer, batch)
    batch = batch.with_logprobs("ref_logprobs", gather_logprobs(trainer, batch, policy="reference"))
    report = trainer.update(shard_of(trainer, batch)[1], trainer.cfg.algorithm)
    result = {
        "kl": report.metrics["actor/kl_loss"],
        "reference": max_diff(before, gather_logprobs(trainer, batch, policy="reference")),
        "actor": max_diff(before, gather_logprobs(trainer, batch)),
    }
    trainer.close()
    return result


def bf16(kind: str, layout: Layout) -> dict[str, Any]:
    """Mixed precision: near fp32 log-probabilities, and an fp32 master weight (a tiny step is not lost)."""
    data = load_reference(kind)
    trainer = make_trainer(model_folder(kind), layout, dtype="bfloat16")
    result: dict[str, Any] = {
        "logprobs": max_diff(gather_logprobs(trainer, data["batches"][0]), data["logprobs"])
    }
    norms = [
        trainer.update(shard_of(trainer, b)[1], trainer.cfg.algorithm).grad_norm for b in data["batches"]
    ]
    result["norms"] = norms
    result["dtype"] = sorted({str(p.dtype) for m in trainer.modules for p in m.parameters()})
    trainer.close()
    return result


def attention(dtype: str, varlen: bool, size: int = 1) -> dict[str, float]:
    """Attention functions alone; see attention_check.py."""
    from attention_check import compare

    return compare(getattr(torch, dtype), varlen, size)


def refusals(kind: str, layout: Layout) -> dict[str, str]:
    """The message of everything that must be refused; a non-finite loss changes no parameter."""
    from safetensors.torch import load_file, save_file

    found = {}
    data = load_reference(kind)
    trainer = make_trainer(model_folder(kind), layout)
    batch = data["batches"][0]
    bad = dataclasses.replace(batch.groups[0].trajectories[0], advantages=np.full(5, np.inf, np.float32))
    group = dataclasses.replace(batch.groups[0], trajectories=(bad, *batch.groups[0].trajectories[1:]))
    before = weights(trainer)
    found["nonfinite"] = _message(
        TrainerError,
        lambda: trainer.update(
            shard_of(trainer, Batch.of([group, *batch.groups[1:]]))[1], trainer.cfg.algorithm
        ),
    )
    found["reference"] = _message(TrainerError, lambda: gather_logprobs(trainer, batch, policy="reference"))
    after = weights(trainer)
    found["unchanged"] = str(all(torch.equal(before[n], after[n]) for n in before))
    (FOLDER / "file").write_text("not a folder")
    found["unwritable"] = _message(TrainerError, lambda: trainer.save(str(FOLDER / "file" / "checkpoint")))
    found["unexportable"] = _message(ModelError, lambda: trainer.export(str(FOLDER / "file" / "model")))
    found["unloadable"] = _message(TrainerError, lambda: trainer.load(str(FOLDER)))
    # A write beyond this size fails as on a full disk, in the middle of a file.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    found["full"] = _message(TrainerError, lambda: trainer.save(str(FOLDER / "full")))
    found["full_export"] = _message(ModelError, lambda: trainer.export(str(FOLDER / "full_model")))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found["leftovers"] = str([p.name for p in FOLDER.iterdir() if "full_model" in p.name])
    trainer.close()
    source = model_folder(kind)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    changes = {
        "missing": {n: t for n, t in tensors.items() if n != name},
        "misshapen": {**tensors, name: tensors[name][:-1].clone()},
        "unknown": {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(128)},
        "no_weights": None,
    }
    for what, changed in changes.items():
        folder = FOLDER / what
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        if changed is not None:
            save_file(changed, folder / "model.safetensors")
        found[what] = _message(ModelError, lambda folder=folder: make_trainer(folder, layout))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return found


def _message(kind: type[RedoneError], action: Any) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "not refused"


def main() -> None:
    global FOLDER
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    FOLDER = Path(job["folder"])
    torch.set_num_threads(1)
    if delay := os.environ.get("REDONE_DUMP_AFTER"):
        faulthandler.dump_traceback_later(float(delay), exit=True)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{job['port']}", rank=rank, world_size=job["world"]
    )
    import more

    check_megatron()
    gc.freeze()  # what is imported stays: close_groups then collects in no time
    results = {}
    for name, function, arguments in job["cases"]:
        start = time.monotonic()
        results[name] = (globals().get(function) or getattr(more, function))(**arguments)
        dist.barrier()
        close_groups()
        sys.stdout.write(f"{time.monotonic() - start:6.2f} s  {name}\n")
        sys.stdout.flush()
    if rank == 0:
        Path(job["result"]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import worker  # the module that more.py sees, in place of a second copy of it

    worker.main()
