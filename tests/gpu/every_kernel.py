"""Launches every kernel once at sizes that end inside a tile; compute-sanitizer watches (test_kernels.py)."""

from __future__ import annotations

import torch
from redone_kernels.dapo_loss import DapoConfig, dapo_loss
from redone_kernels.fp8_blocks import pack_fp8_blocks
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import linear_logprob
from redone_kernels.segment_sum import segment_sum

N, H, V = 131, 136, 1003


def main() -> None:
    where = torch.device("cuda")
    torch.manual_seed(0)
    target = torch.randint(0, V - 40, (N,), device=where)
    rows, mask = (torch.randn(N, device=where) for _ in range(2))
    everything = DapoConfig(dual_clip=3.0, tis_cap=1.5, kl_beta=0.1, ent_coef=0.01)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(N, H, device=where).to(dtype).requires_grad_()
        w = torch.randn(V, H, device=where).to(dtype).requires_grad_()
        for backend in ("fused", "chunked"):
            out = linear_logprob(x, w, target, vocab_size=V - 40, entropy="grad", backend=backend)  # type: ignore[arg-type]
            assert out.entropy is not None
            (out.logprob.sum() + out.entropy.sum()).backward()
        linear_dapo(
            x, w, target, rows, rows, mask > 0, 9.0, everything, ref_logprob=rows, rollout_logprob=rows,
            chunk_tokens=50,
        ).loss.backward()  # fmt: skip
    dapo_loss(rows, rows, rows, mask > 0, 9.0, DapoConfig())
    segment_sum(rows, torch.tensor([0, 5, 5, N], device=where), mask > 0)
    pack_fp8_blocks([torch.randn(s, device=where).bfloat16() for s in ((130, 140), (3, 5))])
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
