"""What the trainer must reproduce: Hugging Face models, a loss written out here, and torch's AdamW.

Nothing is imported from redone but values and the folder of the tiny model.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redone.types import Batch, TrainGroup, Trajectory

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LR, WARMUP, TOTAL, WEIGHT_DECAY, CLIP_GRAD = 1e-3, 2, 10, 0.1, 0.5
# Below epsilon a gradient's own rounding decides AdamW's step: with 1e-8 single weights of Hugging Face in
# fp32 and in fp64 differ by 4e-5 and more, depending on the CPU.
ADAM = {"betas": (0.9, 0.95), "eps": 1e-6}
# (prompt length, response lengths): ragged, a one-token prompt, a one-sample group, one-token responses.
SHAPES = ((20, (5, 7, 3, 12)), (1, (4, 4)), (9, (6,)), (17, (1, 9, 9, 2)))


def make_batch(seed: int, vocab: int = 128) -> Batch:
    """Random tokens; about a tenth of the response tokens is outside the loss."""
    rng = np.random.default_rng(seed)

    def trajectory(length: int) -> Trajectory:
        return Trajectory(
            token_ids=rng.integers(3, vocab, length).astype(np.int32),
            loss_mask=rng.random(length) > 0.1,
            advantages=np.full(length, rng.standard_normal(), np.float32),
            engine_logprobs=rng.standard_normal(length).astype(np.float32),
        )

    groups = [
        TrainGroup(
            prompt_id=f"p{i}",
            prompt_ids=rng.integers(3, vocab, prompt).astype(np.int32),
            trajectories=tuple(trajectory(n) for n in responses),
        )
        for i, (prompt, responses) in enumerate(SHAPES)
    ]
    return Batch.of(groups)


def load_model(path: str | Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs(
    model: torch.nn.Module, group: TrainGroup, trajectory: Trajectory, temperature: float = 1.0
) -> Tensor:
    """[R] log-probabilities of one response, one ordinary sequence at a time."""
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, trajectory.token_ids])).long()[None]
    scores = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
    start = len(group.prompt_ids)
    return scores[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


def all_logprobs(model: torch.nn.Module, batch: Batch, temperature: float = 1.0) -> list[list[np.ndarray]]:
    with torch.no_grad():
        return [[logprobs(model, g, t, temperature).numpy() for t in g.trajectories] for g in batch.groups]


def with_old_logprobs(model: torch.nn.Module, batch: Batch, seed: int) -> Batch:
    """Old log-probabilities = the model's + noise, so that some ratios are clipped."""
    rng = np.random.default_rng(seed)
    noisy = [
        [(v + 0.15 * rng.standard_normal(v.shape)).astype(np.float32) for v in per_group]
        for per_group in all_logprobs(model, batch)
    ]
    return batch.with_logprobs("old_logprobs", noisy)


def dapo_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """-sum over loss tokens of min(r A, clip(r) A) / number of loss tokens."""
    total = torch.zeros(())
    for group in batch.groups:
        for t in group.trajectories:
            ratio = (logprobs(model, group, t) - torch.from_numpy(t.old_logprobs)).exp()
            advantage = torch.from_numpy(t.advantages)
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            terms = -torch.minimum(ratio * advantage, clipped * advantage)
            total = total + (terms * torch.from_numpy(t.loss_mask)).sum()
    return total / batch.num_loss_tokens


def lr_at(step: int) -> float:
    """Warm-up that reaches the peak at its last step, then cosine to 0 at the last of TOTAL steps."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    return LR * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - 1 - WARMUP)))


def gradients(model: torch.nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and the gradient of every parameter under its name in the model folder."""
    model.zero_grad()
    loss = dapo_loss(model, batch)
    loss.backward()
    return loss.item(), folder_tensors({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def train(model: torch.nn.Module, batches: list[Batch]) -> list[tuple[float, float]]:
    """One AdamW step per batch, in place. Returns (loss, gradient norm) per step."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, **ADAM)
    history = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = dapo_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def folder_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module names -> names in a model folder: transformers stacks experts in memory, not on disk."""
    result = {}
    for name, value in named.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, both in enumerate(value):
                gate, up = both.chunk(2, 0)
                result[f"{stem}{e}.gate_proj.weight"], result[f"{stem}{e}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for e, down in enumerate(value):
                result[f"{stem}{e}.down_proj.weight"] = down
        else:
            result[name] = value
    return {name: value.detach().clone() for name, value in result.items()}
