"""Quality and speed of the micro-batch planner (redone.data.pack.plan_step) on real and on paper lengths.

python benchmarks/throughput/pack.py --data FOLDER [--out benchmarks/results/pack.json]

FOLDER holds sns-bench/, redtrans-bench/ and gsm8k/ as published; one token counts as 4 UTF-8 bytes there.
The 16 responses of a prompt scatter log-normally (sigma 0.4) around the published answer. "paper":
limits of RedOne 2.0 (prompt <= 10,000, response <= 8,192), log-normal inside them: the paper gives limits,
not distributions.

For every row: micro-batches per rank, their lower bounds (tokens / budget; the best proven), share of the
token budget in use, max / mean over ranks of the cost (quadratic attention of Qwen3-30B-A3B), and the same of
the lock step, in which the ranks wait for each other after every micro-batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from record import Record, arguments

from redone.data.balance import Cost
from redone.data.pack import plan_step
from redone.data.stock import lower_bound
from redone.types import Batch, StepPlan, TrainGroup, Trajectory

BUDGET, SAMPLES = 20_480, 16
RANKS = (1, 2, 4, 8, 16, 32)
PER_RANK = (8, 32)  # micro-batches per rank, at least
LARGEST = 100_000  # samples of one step
DRAWS, SMALL = (
    4,
    64,
)  # so many batches of up to SMALL micro-batches: the less there is to choose from, the more luck
COST = Cost(row=0.11, pair=1.4e-4)  # Qwen3-30B-A3B, layout.token_costs
Lengths = tuple[int, list[int]]  # prompt, responses


def from_pairs(pairs: list[tuple[str, str]]) -> Callable[[np.random.Generator], Lengths]:
    sizes = [(max(1, len(p.encode()) // 4), max(1, len(r.encode()) // 4)) for p, r in pairs]

    def draw(rng: np.random.Generator) -> Lengths:
        prompt, answer = sizes[rng.integers(len(sizes))]
        return prompt, scatter(rng, answer, 8192)

    return draw


def scatter(rng: np.random.Generator, center: float, limit: int) -> list[int]:
    return np.clip(np.exp(rng.normal(np.log(center), 0.4, SAMPLES)), 2, limit).astype(int).tolist()


def limits(prompt: float, prompt_sigma: float, response: float, sigma: float) -> Callable[..., Lengths]:
    def draw(rng: np.random.Generator) -> Lengths:
        p = int(np.clip(np.exp(rng.normal(np.log(prompt), prompt_sigma)), 32, 10_000))
        return p, scatter(rng, np.exp(rng.normal(np.log(response), sigma)), 8192)

    return draw


def distributions(folder: Path) -> dict[str, Callable[[np.random.Generator], Lengths]]:
    sns = [
        (item["content"], str(item.get("answer", item.get("label", ""))))
        for file in sorted((folder / "sns-bench").glob("*.json"))
        for item in json.loads(file.read_text(encoding="utf-8"))
        if isinstance(item.get("content"), str)
    ]
    translation = [
        (item[item["src_lang"]], item[item["dst_lang"]])
        for item in json.loads((folder / "redtrans-bench/RedTrans-Bench.json").read_text(encoding="utf-8"))
    ]
    lines = (folder / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    maths = [(item["question"], item["answer"]) for item in map(json.loads, lines)]
    return {
        "sns-bench": from_pairs(sns),
        "redtrans-bench": from_pairs(translation),
        "gsm8k": from_pairs(maths),
        "paper, short answers": limits(1500, 0.9, 40, 0.8),
        "paper, long prompts": limits(5000, 0.5, 60, 0.8),
        "paper, rationales": limits(1500, 0.9, 400, 0.6),
        "paper, long answers": limits(150, 0.5, 3000, 0.7),
    }


def batch_of(shapes: list[Lengths]) -> Batch:
    """A batch of these lengths; contents are zeros, which arrays of equal length share."""
    longest = max(max(p, *r) for p, r in shapes)
    ids, floats, mask = np.zeros(longest, np.int32), np.zeros(longest, np.float32), np.ones(longest, np.bool_)

    def trajectory(n: int) -> Trajectory:
        return Trajectory(
            token_ids=ids[:n], loss_mask=mask[:n], advantages=floats[:n], engine_logprobs=floats[:n]
        )

    groups = tuple(
        TrainGroup(prompt_id=str(i), prompt_ids=ids[:p], trajectories=tuple(map(trajectory, r)))
        for i, (p, r) in enumerate(shapes)
    )
    return Batch(
        groups=groups, num_loss_tokens=sum(sum(r) for _, r in shapes), num_sequences=len(shapes) * SAMPLES
    )


def bounds(shapes: list[Lengths], dp: int, sharing: bool) -> dict[str, int]:
    """Micro-batches per rank that no plan can undercut: by the sum of tokens, and the best that is proven."""
    if sharing:
        total = sum(p * max(1, -(-sum(r) // (BUDGET - p))) + sum(r) for p, r in shapes)
        plain = best = -(-total // BUDGET)
    else:
        sizes = [p + n for p, r in shapes for n in r]
        plain, best = -(-sum(sizes) // BUDGET), lower_bound(sizes, BUDGET)
    return {"plain_bound": -(-plain // dp), "lower_bound": -(-best // dp)}


def draw_batch(
    draw: Callable[..., Lengths], dp: int, sharing: bool, per_rank: int, number: int
) -> list[Lengths]:
    """Groups until `per_rank` micro-batches per rank are needed and a random part of one more."""
    rng = np.random.default_rng(dp + 100 * per_rank + 100_003 * number)
    wanted = (per_rank + rng.random()) * dp * BUDGET
    shapes: list[Lengths] = []
    tokens = 0
    while tokens < wanted and len(shapes) * SAMPLES <= LARGEST:
        shapes.append(draw(rng))
        prompt, responses = shapes[-1]
        tokens += prompt * (1 if sharing else SAMPLES) + sum(responses)
    return shapes


def quality(batch: Batch, plan: StepPlan, sharing: bool, dp: int) -> dict[str, float]:
    tokens, costs = [], []
    for slot in plan.slots:
        for pieces in slot:
            groups = [(batch.groups[p.group], p.samples) for p in pieces]
            lengths = [(len(g.prompt_ids), [len(g.trajectories[i].token_ids) for i in s]) for g, s in groups]
            tokens.append(sum(p + sum(r) for p, r in lengths))
            costs.append(sum(COST.prompt(p) + sum(COST.response(p, n) for n in r) for p, r in lengths))
    table = np.array(costs).reshape(-1, dp)
    return {
        "micro_batches": len(plan.slots),
        "budget_used": sum(tokens) / (len(tokens) * BUDGET),
        "max_over_mean": float(table.sum(0).max() / table.sum(0).mean()),
        "lock_step": float(table.max(1).sum() / table.mean(1).sum()),
        "over_budget": int(sum(t > BUDGET for t in tokens)),
    }


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    cases = product(distributions(folder).items(), (False, True), RANKS, PER_RANK, range(DRAWS))
    for (name, draw), sharing, dp, per_rank, number in cases:
        if number and dp * per_rank > SMALL:
            continue
        shapes = draw_batch(draw, dp, sharing, per_rank, number)
        if len(shapes) * SAMPLES > LARGEST:
            continue
        batch = batch_of(shapes)
        plan = plan_step(batch, dp, BUDGET, sharing, COST)
        yield {
            "lengths": name,
            "sharing": sharing,
            "dp": dp,
            "draw": number,
            "samples": len(shapes) * SAMPLES,
            **bounds(shapes, dp, sharing),
            **quality(batch, plan, sharing, dp),
        }


def speed(folder: Path) -> list[dict[str, Any]]:
    """CPU seconds (one thread) to plan 100,000 samples."""
    result = []
    for name, draw in distributions(folder).items():
        rng = np.random.default_rng(0)
        batch = batch_of([draw(rng) for _ in range(100_000 // SAMPLES)])
        for sharing in (False, True):
            start = time.process_time()
            plan = plan_step(batch, 32, BUDGET, sharing, COST)
            seconds = time.process_time() - start
            result.append(
                {"lengths": name, "sharing": sharing, "seconds": seconds, "micro_batches": len(plan.slots)}
            )
    return result


def summary(found: list[dict[str, Any]], fast: list[dict[str, Any]]) -> dict[str, object]:
    many = [row for row in found if row["plain_bound"] >= 32 and not row["sharing"]]
    low = [row for row in many if row["budget_used"] < 0.97]
    return {
        "rows": len(found),
        "most_above_lower_bound": max(r["micro_batches"] - r["lower_bound"] for r in found),
        "most_above_plain_bound": max(r["micro_batches"] - r["plain_bound"] for r in found),
        "above_plain_bound": sum(r["micro_batches"] > r["plain_bound"] for r in found),
        "worst_max_over_mean": max(r["max_over_mean"] for r in found),
        "worst_lock_step": max(r["lock_step"] for r in found),
        "unshared_from_32": len(many),
        "least_budget_used_unshared_from_32": min(r["budget_used"] for r in many),
        "below_97_percent": [f"{r['lengths']} DP{r['dp']} draw {r['draw']}" for r in low],
        "slowest_100k_seconds": max(r["seconds"] for r in fast),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    record = Record(args, "numpy")
    found, fast = list(rows(args.data)), speed(args.data)
    result = {"budget": BUDGET, "summary": summary(found, fast), "rows": found, "speed": fast}
    record.write(result)
    for row in found:
        sys.stdout.write(
            f"{row['lengths']:22s} {'shared' if row['sharing'] else 'plain ':6s} DP{row['dp']:<3d} "
            f"{row['micro_batches']} (bounds {row['plain_bound']}, {row['lower_bound']}) "
            f"used {row['budget_used']:.3f} max/mean {row['max_over_mean']:.3f} "
            f"lock step {row['lock_step']:.3f}\n"
        )
    for row in fast:
        sys.stdout.write(
            f"100,000 samples, {row['lengths']}, sharing {row['sharing']}: {row['seconds']:.2f} s\n"
        )
    sys.stdout.write(json.dumps(result["summary"], indent=1) + "\n")


if __name__ == "__main__":
    main()
