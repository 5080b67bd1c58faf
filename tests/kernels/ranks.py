"""One tensor-parallel rank of test_references.test_two_tensor_parallel_ranks; fails by assertion."""

from __future__ import annotations

import torch
import torch.distributed as dist
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import linear_logprob

from tests.kernels.cases import FULL, Head, oracle, relative, tokens, worst

PADDED, REAL = 64, 57  # rank 1 holds padding rows
CPU = torch.device("cpu")


def check_logprob(head: Head, rank: int, group: dist.ProcessGroup) -> None:
    width = PADDED // 2
    mine = slice(rank * width, (rank + 1) * width)
    exact = Head(head.hidden.double().requires_grad_(), head.weight.double().requires_grad_(), head.target)
    logprob, entropy, _ = oracle(exact, vocab_size=REAL)
    (logprob * 2 + entropy).sum().backward()
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight[mine].clone()
    main_grad = torch.ones_like(weight)
    out = linear_logprob(
        hidden, weight.requires_grad_(), head.target, vocab_start=rank * width, vocab_size=REAL,
        tp_group=group, entropy="grad", backend="chunked", chunk_tokens=5,
        wgrad_out=main_grad, dhidden_reduce="all_reduce",
    )  # fmt: skip
    assert out.entropy is not None
    assert worst(out.logprob, logprob) <= 1e-5 and worst(out.entropy, entropy) <= 1e-5
    (out.logprob * 2 + out.entropy).sum().backward()
    assert relative(hidden.grad, exact.hidden.grad) <= 2e-6
    assert weight.grad is None and relative(main_grad - 1, exact.weight.grad[mine]) <= 2e-6


def check_dapo(head: Head, rank: int, group: dist.ProcessGroup) -> None:
    arguments = tokens(head.target.numel(), CPU)
    del arguments["logprob"], arguments["entropy"]
    width = PADDED // 2
    mine = slice(rank * width, (rank + 1) * width)
    results = []
    for weight, place in (
        (head.weight, {}),
        (head.weight[mine], {"vocab_start": rank * width, "tp_group": group, "dhidden_reduce": "all_reduce"}),
    ):
        leaves = head.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_dapo(
            *leaves, head.target, **arguments, denom=4.0, cfg=FULL, vocab_size=REAL, chunk_tokens=5, **place
        )  # type: ignore[arg-type]
        out.loss.backward()
        results.append((out.loss, leaves[0].grad, leaves[1].grad))
    (loss, dx, dw), (mine_loss, mine_dx, mine_dw) = results
    assert relative(mine_loss, loss) <= 1e-5
    assert relative(mine_dx, dx) <= 2e-6 and relative(mine_dw, dw[mine]) <= 2e-6


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    head = Head.random(13, 24, PADDED, CPU, vocab_size=REAL)
    group = dist.group.WORLD
    assert group is not None
    check_logprob(head, dist.get_rank(), group)
    check_dapo(Head(head.hidden, head.weight, head.target.clamp(min=0)), dist.get_rank(), group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
