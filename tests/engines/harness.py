"""An engine under test, the weights it should hold, and the trainer's end of the channel."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redone.config.schema import (
    Config,
    DataConfig,
    ExactReward,
    ModelSection,
    RolloutConfig,
    VllmEngine,
)
from redone.types import Completion, Sampling, WeightBucket, WeightPlan
from redone.weights.channel import ShmWriter
from redone.weights.digest import bucket_digests
from redone.weights.plan import make_plan
from tests.engines.engine_process import EngineProcess

BUCKET_BYTES = 50_000  # small enough that most layers straddle two buckets


def engine_config(path: Path, in_process: bool, replay: str = "auto", **rollout: Any) -> Config:
    return Config(
        trainer={"moe": {"routing_replay": replay}},
        model=ModelSection(path=str(path), dtype="float32"),
        data=DataConfig(train=("unused",), max_prompt_length=128, max_response_length=384),
        rewards={"default": ExactReward()},
        rollout=RolloutConfig(engine=VllmEngine(in_process=in_process, kv_cache_mb=64), **rollout),
    )


class HeldWeights:
    """A model folder and the Hugging Face model of it: what the engine should compute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(folder / "model.safetensors")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def perturbed(self, seed: int, folder: Path) -> HeldWeights:
        shutil.copytree(self.folder, folder)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in self.tensors.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return HeldWeights(folder)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[len, vocab] fp32"""
        return self.model(torch.tensor([list(ids)])).logits[0].float()

    @torch.no_grad()
    def routes(self, ids: Sequence[int], choices: int = 2) -> np.ndarray:
        """[len, layers, choices], each token's in ascending order"""
        found = self.model(torch.tensor([list(ids)]), output_router_logits=True).router_logits
        return torch.stack([layer.topk(choices, -1).indices for layer in found], 1).sort(-1)[0].numpy()

    def logprobs(
        self, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
    ) -> np.ndarray:
        """[len(response)]"""
        ids = [*prompt, *response]
        all_logprobs = torch.log_softmax(self.logits(ids) / temperature, -1)[len(prompt) - 1 : -1]
        return all_logprobs.gather(1, torch.tensor(response)[:, None].long())[:, 0].numpy()


class LiveEngine:
    """An engine process, the weights it should hold, and the trainer's end of the channel."""

    def __init__(self, cfg: Config, folder: Path, work: Path) -> None:
        self.cfg, self.work = cfg, work
        self.held = HeldWeights(folder)
        self.process = EngineProcess(cfg)
        try:
            self.info = self.process.call("start")
        except BaseException:
            self.process.kill()
            raise
        self.version = 0
        metas = [
            (name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in self.held.tensors.items()
        ]
        self.plan = make_plan(metas, BUCKET_BYTES)
        self.writer = ShmWriter(str(work / "weights"), self.plan.total_bytes)

    def generate(self, prompt: Sequence[int], seeds: Sequence[int], **sampling: Any) -> Any:
        return self.process.call("generate", prompt, Sampling(**{"max_tokens": 24, **sampling}), seeds)

    def next_weights(self) -> tuple[HeldWeights, tuple[WeightBucket, ...]]:
        """Perturb, write into the channel; the engine knows nothing of it yet."""
        self.version += 1
        new = self.held.perturbed(self.version, self.work / f"v{self.version}")
        return new, self.publish(new)

    def publish(self, weights: HeldWeights) -> tuple[WeightBucket, ...]:
        for t in self.plan.tensors:
            data = weights.tensors[t.name].contiguous().view(torch.uint8).reshape(-1)
            self.writer.view(t.offset, t.nbytes).copy_(data)
        return tuple(
            WeightBucket(
                version=self.version,
                index=i,
                location=self.writer.location,
                digests=bucket_digests(self.plan, i, self.writer),
            )
            for i in range(len(self.plan.buckets))
        )

    def push(
        self, buckets: Sequence[WeightBucket], weights: HeldWeights, plan: WeightPlan | None = None
    ) -> None:
        self.process.call("begin_update", plan or self.plan)
        for bucket in buckets:
            self.process.call("load", bucket)
        self.process.call("commit", self.version)
        self.process.call("resume")
        self.held = weights

    def push_while_generating(
        self, prompt: Sequence[int], sampling: Sampling, timeout_s: float = 60
    ) -> tuple[HeldWeights, HeldWeights, list[Completion]]:
        """(old weights, new weights, two completions that hold tokens of both)."""
        old, (new, buckets) = self.held, self.next_weights()
        running = self.process.submit("generate", prompt, sampling, [1, 2])
        time.sleep(0.4)
        self.push(buckets, new)
        completions = running.result(timeout=timeout_s)
        for completion in completions:
            first, second = completion.versions
            assert (first.version, second.version) == (self.version - 1, self.version)
        return old, new, completions

    def misplan(self) -> WeightPlan:
        return dataclasses.replace(self.plan, hash="0" * 32)
