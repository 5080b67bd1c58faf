"""The PyTorch side: references gradchecked in fp64, operators on CPU tensors, two tensor-parallel ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from redone_kernels import dapo_loss, launch, reference
from redone_kernels.fp8_blocks import pack_fp8_blocks
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import linear_logprob
from redone_kernels.segment_sum import segment_sum
from torch import Tensor

from tests.kernels.cases import CONFIGS, FULL, Head, doubled, oracle, relative, tokens, worst

CPU = torch.device("cpu")


def test_this_process_runs_the_references() -> None:
    assert not launch.runs_triton(torch.zeros(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_dapo_gradient_is_autograds(name: str) -> None:
    arguments = doubled(tokens(400, CPU))
    arguments["logprob"].requires_grad_()
    loss, _, slope = reference.dapo_loss(**arguments, denom=7.0, cfg=CONFIGS[name])
    (want,) = torch.autograd.grad(loss, arguments["logprob"])
    assert relative(slope, want) <= 1e-14


def test_dapo_gradcheck() -> None:
    arguments = doubled(tokens(12, CPU))
    mask = arguments["mask"]

    def value(logprob: Tensor, entropy: Tensor) -> Tensor:
        return dapo_loss.dapo_loss(
            **(arguments | {"logprob": logprob, "entropy": entropy}), denom=3.0, cfg=FULL
        ).loss

    leaves = [torch.where(mask, arguments[k], 0.0).requires_grad_() for k in ("logprob", "entropy")]
    assert torch.autograd.gradcheck(value, leaves)


def test_dapo_agrees_with_the_token_terms() -> None:
    """Without weights and extra terms it is the masked sum of reference.dapo over the denominator."""
    arguments = doubled(tokens(60, CPU))
    loss, _, _ = reference.dapo_loss(**arguments, denom=9.0, cfg=reference.DapoConfig(dual_clip=3.0))
    mask = arguments["mask"]
    rows = [arguments[k][mask] for k in ("logprob", "old_logprob", "advantage")]
    assert float(reference.dapo(*rows, dual_clip=3.0).loss.sum() / 9.0) == pytest.approx(
        float(loss), rel=1e-12
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_linear_logprob_gradcheck(backend: str) -> None:
    head = Head.random(5, 6, 11, CPU, dtype=torch.float64)
    head.target[2] = -100

    def value(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logprob(
            hidden, weight, head.target, entropy="grad", backend=backend, temperature=0.7, chunk_tokens=2,
            vocab_size=11,
        )  # type: ignore[arg-type]  # fmt: skip
        assert out.entropy is not None
        return out.logprob, out.entropy

    assert torch.autograd.gradcheck(value, (head.hidden.requires_grad_(), head.weight.requires_grad_()))


def test_linear_dapo_gradcheck() -> None:
    head = Head.random(7, 6, 11, CPU, dtype=torch.float64, ignore=False)
    arguments = doubled(tokens(7, CPU))
    arguments["mask"][:2] = True
    arguments = {k: v.nan_to_num() if v.is_floating_point() else v for k, v in arguments.items()}
    del arguments["logprob"], arguments["entropy"]

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_dapo(hidden, weight, head.target, **arguments, denom=3.0, cfg=FULL, chunk_tokens=3).loss

    assert torch.autograd.gradcheck(value, (head.hidden.requires_grad_(), head.weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_matches_fp64(dtype: torch.dtype) -> None:
    head = Head.random(33, 48, 300, CPU, dtype=dtype, scale=3.0, vocab_size=290)
    out = linear_logprob(
        head.hidden, head.weight, head.target, entropy="metric", chunk_tokens=10, vocab_size=290
    )
    for a, b in zip(out, oracle(head, vocab_size=290), strict=True):
        assert worst(a, b) <= 2e-5 * 3


def test_segment_sum_gradcheck() -> None:
    cu = torch.tensor([0, 3, 3, 8])
    mask = torch.tensor([True, False, True, True, True, False, True, True])
    values = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, cu, mask).sums, (values,))


def test_fp8_is_the_engines_quantiser() -> None:
    """Bit for bit vLLM's, in a process of its own: importing it changes the one it is imported in."""
    code = """
import torch
from vllm.utils.deep_gemm import per_block_cast_to_fp8
from redone_kernels.reference import pack_fp8_block
torch.manual_seed(0)
for shape, size in (((200, 300), 1.0), ((128, 128), 1e-3), ((5, 7), 100.0), ((130, 16), 0.0)):
    w = (torch.randn(shape) * size).bfloat16()
    for mine, theirs in zip(pack_fp8_block(w), per_block_cast_to_fp8(w), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.float(), theirs.float()), shape
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_fp8_bucket_of_many() -> None:
    weights = [torch.randn(s).bfloat16() for s in ((130, 140), (3, 5))]
    got = pack_fp8_blocks(weights)
    want = [reference.pack_fp8_block(w) for w in weights]
    assert torch.equal(got.values.float(), torch.cat([v.float().flatten() for v, _ in want]))
    assert torch.equal(got.scales, torch.cat([s.flatten() for _, s in want]))


def test_fused_says_what_it_needs() -> None:
    head = Head.random(3, 8, 16, CPU)
    with pytest.raises(ValueError, match="CUDA"):
        linear_logprob(head.hidden, head.weight, head.target, backend="fused")


def test_cpu_needs_no_triton() -> None:
    """The head and the losses of a CPU run, where importing triton fails."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from redone_kernels.linear_dapo import linear_dapo, DapoConfig
from redone_kernels.linear_logprob import linear_logprob
from redone_kernels.segment_sum import segment_sum
x, w, t = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.arange(5)
linear_logprob(x, w, t).logprob.sum().backward()
linear_dapo(x, w, t, None, torch.ones(5), t > 1, 3.0, DapoConfig()).loss.backward()
segment_sum(x[:, 0], torch.tensor([0, 2, 5]), t > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_tensor_parallel_ranks(repo: Path) -> None:
    """tests/kernels/ranks.py on gloo: values, gradients, main_grad and linear_dapo equal one rank's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
        "PYTHONPATH": f"{repo}:{repo / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.ranks"], cwd=repo, env=environment | {"RANK": str(r)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    output = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output)[-6000:]
