"""One redone step after another, each when told to: the protocol of worker_trl.py, redone's environment."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from redone_launcher.training import load_inputs, versions

from redone.cluster.cluster import RayCluster
from redone.config.load import load_config
from redone.data.stream import PromptStream
from redone.pipeline.step import rl_step
from redone.record.timing import Timings
from redone.rollout.source import open_source

REPO = Path(__file__).parents[2]
QUIET = os.dup(1)  # Ray and vLLM write to stdout too


def say(**values: Any) -> None:
    os.write(QUIET, ("PEER " + json.dumps(values) + "\n").encode())


def overrides(work: dict[str, Any]) -> list[str]:
    """The quickstart's configuration with the comparison's work: no dynamic sampling, no order of its own."""
    lengths = [work["response_tokens"]] * work["samples"]
    return [
        f"model.path={work['model']}",
        f"data.train=[{work['data_parquet']}]",
        "data.val=[]",
        "data.test=[]",
        "data.shuffle=false",
        "data.balance_key=null",
        f"data.max_response_length={work['response_tokens']}",
        f"rollout.forced_lengths={json.dumps(lengths)}",
        f"rollout.n={work['samples']}",
        f"rollout.temperature={work['temperature']}",
        "algorithm.filter_groups.enable=false",
        "algorithm.entropy_coeff=0",
        f"algorithm.train_batch_size={work['prompts']}",
        f"algorithm.ppo_mini_batch_size={work['prompts']}",
        f"algorithm.total_steps={work['steps']}",
        f"trainer.optim.lr={work['lr']}",
        "trainer.optim.lr_warmup_steps=0",
        "trainer.optim.betas=[0.9,0.999]",
        "evaluate.baselines=[]",
        "evaluate.every=0",
        "evaluate.keep_best=false",
    ]


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        work = json.load(file)
    cfg = load_config(REPO / "configs/quickstart/smollm2.yaml", overrides(work))
    inputs = load_inputs(cfg)
    logs = Path(tempfile.mkdtemp(prefix="redone-peer-"))
    cluster = RayCluster(cfg, logs, lambda _: None)
    try:
        stream = PromptStream(inputs.train, cfg.run.seed, cfg.data.shuffle, cfg.data.balance_key)
        say(prompt_tokens=[len(p.token_ids) for p in inputs.train], versions=versions())
        engines, rewards = cluster.engines(), inputs.rewards
        with open_source(stream, engines, rewards, cfg, inputs.chat.stop_token_ids, 0) as source:
            for step in range(1, work["steps"] + 1):
                say(ready=True)
                if sys.stdin.readline().strip() != "step":
                    break
                timings = Timings()
                began = time.perf_counter()
                done = rl_step(step, source, cluster.trainers(), engines, cfg, timings.timing)
                seconds = time.perf_counter() - began
                lengths = sorted({len(t.token_ids) for g in done.batch.groups for t in g.trajectories})
                say(seconds=seconds, phases=timings.drain(), lengths=lengths, groups=len(done.batch.groups))
    finally:
        inputs.rewards.close()
        cluster.close(graceful=True)


if __name__ == "__main__":
    main()
