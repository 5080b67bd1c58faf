"""Prints the predictions of docs/planner.md as Markdown: python benchmarks/planner/predict.py

Qwen3-30B-A3B on H100 nodes of 8, redone's trainer taken to be as fast as NeMo RL's. Predicted, not measured.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from redone.planner.hardware import DEFAULT, gpu
from redone.planner.job import Job, Layout, Workload
from redone.planner.layouts import MARGIN
from redone.planner.lengths import SIGMA, truncated_lognormal
from redone.planner.models import PUBLISHED
from redone.planner.phases import cache_margin
from redone.planner.throughput import Phases, predict

NODES = (1, 2, 4, 8, 16, 32)
BAND = DEFAULT.band_far


def workload(prompts: int, group: int, prompt: float, mean: float, cap: float, updates: int) -> Workload:
    return Workload(
        prompts=prompts,
        samples=group,
        update_sequences=prompts * group // updates,
        updates=updates,
        prompt_tokens=prompt,
        lengths=truncated_lognormal(mean, cap, SIGMA),
        forward_passes=1,
    )


WORK = {
    "NeMo v0.6 (64 x 32, mean 3.2k, cap 4k)": (workload(64, 32, 110, 3203, 3980, 4), (False,)),
    "SNS, answers of 60 (256 x 16, prompts 1.5k)": (workload(256, 16, 1500, 60, 128, 2), (False, True)),
    "SNS, answers of 400 (256 x 16, prompts 1.5k)": (workload(256, 16, 1500, 400, 1024, 2), (False, True)),
}


def job(work: Workload, nodes: int, shared: bool, rollout_nodes: int = 0) -> Job:
    layout = Layout(
        gpu=gpu("h100"),
        train_gpus=8 * (nodes - rollout_nodes),
        rollout_gpus=8 * (rollout_nodes or nodes),
        mode="async" if rollout_nodes else "sync",
        expert=8,
        rollout_tensor=2,
        budget=16384,
        recompute=True,
        shared_prefix=shared,
        utilization=0.8 if rollout_nodes else 0.7,
        cpu_optimizer=nodes == 1,
        trainer_sleeps=True,
    )
    return Job(model=PUBLISHED["q30b"], work=work, layout=layout)


def band(value: float) -> str:
    return f"{value:.0f} [{value / BAND:.0f}-{value * BAND:.0f}]"


def row(name: str, mode: str, one: Job) -> str:
    s: Phases = predict(one)
    rate = one.work.tokens / s.step / one.layout.gpus
    parts = f"{s.rollout:.0f} | {s.logprobs:.0f} | {s.update:.0f} | {s.sync + s.fixed:.0f}"
    samples = band(one.work.sequences / s.step)
    note = "" if cache_margin(one) >= MARGIN else " (KV cache near its limit: not predicted)"
    return f"| {name} | {mode}{note} | {band(s.step)} | {samples} | {band(rate)} | {parts} |\n"


def main() -> None:
    out = sys.stdout.write
    out(
        "| workload, 4 nodes | mode | step [s] | samples/s | tokens/s/GPU"
        " | rollout | log-probs | update | rest |\n"
    )
    out("|---|---|---|---|---|---|---|---|---|\n")
    for name, (work, kinds) in WORK.items():
        for shared in kinds:
            kind = "prefix-shared" if shared else "plain"
            out(row(name, f"colocated, {kind}", job(work, 4, shared)))
        out(row(name, f"2 + 2 nodes, {kind}", job(work, 4, kinds[-1], 2)))
    out("\n| step [s] on nodes | " + " | ".join(f"{n}" for n in NODES) + " |\n")
    out("|---|" + "---|" * len(NODES) + "\n")
    for name, (work, kinds) in WORK.items():
        for kind in ("strong", "weak"):
            cells = []
            for n in NODES:
                scaled = work
                if kind == "weak":
                    scaled = replace(
                        work,
                        prompts=max(1, work.prompts * n // 4),
                        update_sequences=max(1, work.update_sequences * n // 4),
                    )
                cells.append(band(predict(job(scaled, n, kinds[-1])).step))
            out(f"| {name.split(' (')[0]}, {kind} | " + " | ".join(cells) + " |\n")


if __name__ == "__main__":
    main()
