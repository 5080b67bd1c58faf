"""Start N ranks once and run several cases in them: a process costs seconds of imports, a case half a second.

Every rank is `python worker.py <job>`; a case returns plain values, which rank 0 writes to the result file.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Group:
    """Results of one group of ranks, by case name."""

    results: dict[str, Any]
    seconds: float

    def __getitem__(self, case: str) -> Any:
        return self.results[case]


def run_cases(
    world: int,
    cases: Sequence[tuple[str, str, dict[str, Any]]],
    folder: Path,
    timeout_s: float,
    worker: Path = WORKER,
) -> Group:
    """Run cases [(name, function in `worker`, arguments)] on `world` ranks.

    Raises RuntimeError with the failing rank's last lines when any rank fails or the time is over.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    job = {"world": world, "port": port, "cases": list(cases), "result": str(result), "folder": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_COMPILE_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    start = time.monotonic()
    ranks = []
    for rank in range(world):
        with open(folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, "-W", "ignore", str(worker), str(folder / "job.json"), str(rank)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        _wait(ranks, start + timeout_s, folder)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    return Group(json.loads(result.read_text()), time.monotonic() - start)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float, folder: Path) -> None:
    while any(process.poll() is None for process in ranks):
        failed = [i for i, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            time.sleep(1.0)  # let the peers write why they lost their connection
            _fail(failed[0] if failed else 0, "failed" if failed else "ran out of time", folder)
        time.sleep(0.05)
    failed = [i for i, process in enumerate(ranks) if process.poll() != 0]
    if failed:
        _fail(failed[0], "failed", folder)


def _fail(rank: int, what: str, folder: Path) -> None:
    tail = (folder / f"rank{rank}.log").read_text().splitlines()[-25:]
    raise RuntimeError(f"rank {rank} {what}:\n" + "\n".join(tail))
