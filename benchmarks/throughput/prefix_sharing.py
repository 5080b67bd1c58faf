"""Prefix-shared against ordinary training, one optimizer step of the real trainer, on one CPU thread.

python benchmarks/throughput/prefix_sharing.py [--out benchmarks/results/prefix-sharing-cpu.json]

6 layers, hidden 256, vocabulary 4,096, fp32; P prompt tokens, G responses of R tokens. Both ways run in one
process, in turn, and both project response rows only. Times are CPU seconds of the process (medians), so
other load on the machine counts little.
Peak memory: one process per way, VmHWM above what was resident before the
step. The predicted ratio counts FLOP: 6 per weight and token, 14 per head dimension and query-key pair and
layer, 6 per vocabulary weight and response token.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import Record, arguments

from redone.types import Batch, TrainGroup, Trajectory

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 6, 256, 8, 4, 32, 768, 4096
EXPERTS, TOP_K, EXPERT_FFN = 8, 2, 384
REPEATS = 3


def make_batch(prompt: int, response: int, group: int) -> Batch:
    rng = np.random.default_rng(prompt + response + group)

    def trajectory() -> Trajectory:
        return Trajectory(
            token_ids=rng.integers(3, VOCAB, response).astype(np.int32),
            loss_mask=np.ones(response, np.bool_),
            advantages=np.full(response, rng.standard_normal(), np.float32),
            engine_logprobs=np.zeros(response, np.float32),
        )

    ids = rng.integers(3, VOCAB, prompt).astype(np.int32)
    members = tuple(trajectory() for _ in range(group))
    return Batch.of([TrainGroup(prompt_id="p", prompt_ids=ids, trajectories=members)])


def make_trainer(folder: Path, moe: bool) -> Any:
    from redone.config.schema import Config
    from redone.data.tiny import make_tiny_model
    from redone.trainer import build_trainer

    sizes: dict[str, Any] = dict(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, intermediate_size=FFN, vocab_size=VOCAB, max_position_embeddings=16384,
    )  # fmt: skip
    if moe:
        sizes |= dict(num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=EXPERT_FFN)
    model = make_tiny_model(folder / "model", "qwen3_moe" if moe else "qwen3", seed=0, **sizes)
    cfg = Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": ["unused"]},
            "rewards": {},
            "trainer": {"max_token_len_per_rank": 1 << 20, "self_check": False},
        }
    )
    return build_trainer(cfg, 0, 1, f"file://{folder}/rendezvous")


def step(trainer: Any, batch: Batch, sharing: bool) -> float:
    """CPU seconds of one update."""
    from redone.data.pack import build_shards, plan_step

    plan = plan_step(batch, 1, 1 << 20, sharing)
    assert plan.num_microbatches == 1
    shard = build_shards(batch, plan, 1)[0]
    start = time.process_time()
    trainer.update(shard, trainer.cfg.algorithm)
    return time.process_time() - start


def flops(prompt: int, response: int, group: int, sharing: bool, moe: bool) -> float:
    mlp = 3 * HIDDEN * (EXPERT_FFN * TOP_K if moe else FFN)
    weights = LAYERS * (HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + mlp)
    copies = 1 if sharing else group
    tokens = copies * prompt + group * response
    pairs = copies * prompt**2 / 2 + group * (response * prompt + response**2 / 2)
    rows = group * response
    return 6 * weights * tokens + 14 * HEADS * HEAD_DIM * LAYERS * pairs + 6 * HIDDEN * VOCAB * rows


def resident(key: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def peak(shape: tuple[int, int, int], sharing: bool, moe: bool) -> float:
    """MiB that one step needs on top of what is resident; run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), moe)
        step(trainer, make_batch(16, 4, 2), sharing)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step(trainer, make_batch(*shape), sharing)
        return resident("VmHWM") - before


def measure(shape: tuple[int, int, int], moe: bool, repeats: int) -> dict[str, Any]:
    prompt, response, group = shape
    batch = make_batch(*shape)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), moe)
        step(trainer, make_batch(64, 8, 2), True)
        for i in range(repeats):
            for sharing in (True, False) if i % 2 else (False, True):
                seconds[sharing].append(step(trainer, batch, sharing))
        trainer.close()
    memory = {}
    for sharing in (True, False):
        command = [sys.executable, __file__, "--peak", json.dumps([shape, sharing, moe])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory[sharing] = float(done.stdout.splitlines()[-1])
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    return {
        "model": "moe" if moe else "dense",
        "prompt": prompt,
        "response": response,
        "group": group,
        "token_ratio": group * (prompt + response) / (prompt + group * response),
        "seconds_unshared": medians[False],
        "seconds_shared": medians[True],
        "spread": max(max(v) / min(v) for v in seconds.values()),
        "speedup": medians[False] / medians[True],
        "predicted_speedup": flops(*shape, False, moe) / flops(*shape, True, moe),
        "peak_mib_unshared": memory[False],
        "peak_mib_shared": memory[True],
        "peak_ratio": memory[False] / memory[True],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 64, 16), metavar=("P", "R", "G"))
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        shape, sharing, moe = json.loads(args.peak)
        sys.stdout.write(f"{peak(tuple(shape), sharing, moe)}\n")
        return
    record = Record(args, "torch", "megatron-core")
    result = measure(tuple(args.shape), args.moe, args.repeats)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    record.write(result)


if __name__ == "__main__":
    main()
