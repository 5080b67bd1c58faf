"""The published runs (points.csv): what the constants are fitted on, and what tests them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from redone.planner.hardware import DEFAULT, Constants, gpu
from redone.planner.job import Job, Layout, Workload
from redone.planner.lengths import SIGMA, truncated_lognormal
from redone.planner.models import PUBLISHED
from redone.planner.throughput import predict, train_time

# What points.csv lacks of NeMo RL's recipes (examples/configs/recipes/llm/performance, v0.5.0 and v0.6.0):
# logprob_batch_size, micro-batches that a log-probability pass joins, and gpu_memory_utilization.
LOGPROB = {"q30b": 4.0, "q32b": 4.0, "llama8b": 2.0}
LOGPROB_OF_ROW = {
    "nemo-v0.6-q30b-sync-GB200-16-bf16": 2.0,
    "nemo-v0.6-q30b-async1-GB200-16-bf16": 2.0,
    "nemo-v0.5-dsv3-async1-H100-512-bf16": 2.0,
    "nemo-v0.6-dsv3-async1-H100-512-bf16": 2.0,
}
UTILIZATION_OF_ROW = {"nemo-v0.6-q235b-sync-GB200-64-bf16": 0.4, "nemo-v0.6-dsv3-sync-GB200-128-bf16": 0.3}
LINES = {"q25_3b": "q25", "q25_7b": "q25"}  # one model line


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One published figure. kind "step": seconds of an RL step; "train_s": seconds of its updates;
    "train_tps": trained tokens/s/GPU."""

    id: str
    job: Job
    kind: str
    value: float
    rate: float  # published tokens/s/GPU
    family: tuple[str, str, str]  # stack, model line, GPU
    step_tokens: float

    def predicted(self, c: Constants = DEFAULT) -> float:
        """The prediction of `value`."""
        if self.kind == "step":
            return predict(self.job, c).step
        seconds = train_time(self.job, c).updates
        return (
            self.step_tokens / seconds / self.job.layout.train_gpus if self.kind == "train_tps" else seconds
        )

    def slowness(self, c: Constants = DEFAULT) -> float:
        """Predicted / published time: 1 is right, 2 is twice too slow."""
        ratio = self.predicted(c) / self.value
        return 1 / ratio if self.kind == "train_tps" else ratio


def read_points(path: str | Path) -> list[Point]:
    """Every row that the planner claims to predict."""
    with open(path, encoding="utf-8", newline="") as file:
        return [_point(row) for row in csv.DictReader(file) if refusal(row) is None]


def refusal(row: dict[str, str]) -> str | None:
    """Why a row of points.csv is outside the planner's scope, or None."""
    if row["use"] != "1":
        return "incomplete"
    if row["stack"] in ("prime", "automodel") or "fsdp" in row["id"] or "FSDP" in row["source"]:
        return "FSDP"
    if row["cp"] != "1" and ("long" in row["id"] or row["stack"] == "verl"):
        return "context parallelism on packed rows"
    return None


def read_holdout(path: str | Path) -> dict[str, str]:
    """Row id -> "in" or "cross", from the committed list."""
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            kind, *ids = line.split()
            found.update(dict.fromkeys(ids, kind))
    return found


def _joined(row: dict[str, str]) -> float:
    """Micro-batches that a log-probability pass joins."""
    return LOGPROB_OF_ROW.get(row["id"], LOGPROB.get(row["model"], 1.0)) if row["stack"] == "nemo" else 1.0


def _point(row: dict[str, str]) -> Point:
    model, training = PUBLISHED[row["model"]], row["mode"] == "train"
    size = {k: int(row[k]) for k in ("gbs", "prompts", "samples", "tgpus", "ggpus", "mb_tokens", "gen_tp")}
    mean, cap, prompt = float(row["mean_len"]), float(row["cap"]), float(row["prompt_len"])
    sequences = size["prompts"] * size["samples"]
    lengths = (cap,) if training else truncated_lognormal(mean, cap - prompt, SIGMA)
    work = Workload(
        prompts=size["prompts"],
        samples=max(1, size["samples"]),
        update_sequences=size["gbs"],
        updates=max(1, round(sequences / size["gbs"])) if sequences else 1,
        prompt_tokens=prompt,
        lengths=lengths,
        forward_passes=2 if row["stack"] == "nemo" else 1,
        ahead=max(1, int(row["mode"].removeprefix("async") or 1)) if row["mode"].startswith("async") else 1,
    )
    layout = Layout(
        gpu=gpu(row["hw"]),
        train_gpus=size["tgpus"],
        rollout_gpus=size["ggpus"],
        mode="async" if row["mode"].startswith("async") else "sync",
        tensor=int(row["tp"]),
        pipeline=int(row["pp"]),
        virtual=int(row["vp"]),
        expert=int(row["ep"]),
        context=int(row["cp"]),
        rollout_tensor=max(1, size["gen_tp"]),
        budget=size["mb_tokens"] + (int(prompt) if row["stack"] == "skyrl" else 0),  # SkyRL: one sequence
        logprob_batches=_joined(row),
        recompute=row["recompute"] == "1",
        fp8=row["prec"] == "fp8",
        utilization=UTILIZATION_OF_ROW.get(row["id"], 0.6 if row["mode"] == "sync" else 0.8),
        stack="tuned" if row["tune"] == "1" else row["stack"],
    )
    return Point(
        id=row["id"],
        job=Job(model=model, work=work, layout=layout),
        kind=row["kind"],
        value=float(row["value"]),
        rate=float(row["pub_tps"]),
        family=(row["stack"], LINES.get(row["model"], row["model"]), row["hw"]),
        step_tokens=size["gbs"] * (prompt + mean),
    )
