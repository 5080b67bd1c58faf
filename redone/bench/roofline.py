"""The machine's ceilings: the largest matrix product rate and copy bandwidth that torch reaches here, now.

A process of its own measures them (python -m redone.bench.roofline), so that its memory and threads are gone
when the benchmark starts: --device cpu uses `--threads` threads; cuda, the first visible GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from redone.errors import RedoneError

CPU_MATMUL, CUDA_MATMUL = 1024, 8192  # edge of the square matrices
CPU_COPY, CUDA_COPY = 256 * 2**20, 4 * 2**30  # bytes; several times any cache
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Best of several rounds: a ceiling is what the machine can do, not what it does on average."""

    device: str  # name
    dtype: str
    threads: int  # CPU threads that the rates belong to; 0 on CUDA: the rates of one GPU
    matmul_flops: float  # FLOP/s of a square product
    copy_bytes_s: float  # bytes read plus bytes written per second
    seconds: float

    def scaled(self, devices: int) -> Roofline:
        """Of `devices` GPUs together; on a CPU the threads' rates are the machine's already."""
        if self.threads:
            return self
        return Roofline(
            device=self.device,
            dtype=self.dtype,
            threads=0,
            matmul_flops=self.matmul_flops * devices,
            copy_bytes_s=self.copy_bytes_s * devices,
            seconds=self.seconds,
        )


def measure(device: str, dtype: str, threads: int, *, rounds: int = 5, size: int | None = None) -> Roofline:
    """In this process. `size` shrinks the matrices (tests)."""
    import torch

    began = time.perf_counter()
    cuda = device == "cuda"
    if not cuda:
        torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    edge = size or (CUDA_MATMUL if cuda else CPU_MATMUL)
    a, b = (torch.randn(edge, edge, device=device).to(kind) for _ in range(2))
    out = torch.empty(edge, edge, device=device, dtype=kind)
    flops = 2 * edge**3 / _best(lambda: torch.mm(a, b, out=out), rounds, cuda)
    count = (edge * edge * 16) if size else (CUDA_COPY if cuda else CPU_COPY)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * count / _best(lambda: target.copy_(source), rounds, cuda)
    return Roofline(
        device=torch.cuda.get_device_name() if cuda else processor(),
        dtype=dtype,
        threads=0 if cuda else threads,
        matmul_flops=flops,
        copy_bytes_s=copied,
        seconds=time.perf_counter() - began,
    )


def _best(work: Callable[[], object], rounds: int, cuda: bool) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    import torch

    taken = []
    for _ in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def processor() -> str:
    """The CPU's model name as the kernel reports it."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.machine()
    return platform.machine()


def roofline(device: str, dtype: str, threads: int) -> Roofline:
    """Measured in a process that is gone afterwards. Raises RedoneError when it fails."""
    command = [sys.executable, "-m", "redone.bench.roofline", "--device", device, "--dtype", dtype]
    command += ["--threads", str(threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env)
    if done.returncode:
        raise RedoneError(f"the roofline could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return Roofline(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    from dataclasses import asdict

    sys.stdout.write(json.dumps(asdict(measure(args.device, args.dtype, args.threads))) + "\n")


if __name__ == "__main__":
    main()
