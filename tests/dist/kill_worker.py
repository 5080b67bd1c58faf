"""Writers that are killed while they save: `python kill_worker.py MODEL FOLDER TRIALS ASYNCHRONOUS`.

This process imports everything once; every writer is a fork of it. A writer goes on from the newest complete
checkpoint, proves that it holds what was saved, and saves changed weights until it is killed.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kill_trials import build, digest_of, state_of

from redone.pipeline.folder import RunFolder


def writer(model: str, folder: RunFolder, asynchronous: bool, trial: int, report: int) -> None:
    trainer = build(model, folder.path / f"rendezvous-{trial}", asynchronous)
    step = max(folder.steps(), default=0)
    if step:
        trainer.load(str(folder.checkpoint(step) / "trainer"))
        expected = folder.load_state(step).stream["digest"]
        if digest_of(trainer) != expected:
            os.write(report, b"wrong weights\n")
            os._exit(1)
    os.write(report, f"loaded {step}\n".encode())
    while True:
        step += 1
        with torch.no_grad():
            for module in trainer.modules:
                for parameter in module.parameters():
                    parameter.add_(1e-3 * step)
        folder.save(state_of(step, digest_of(trainer)), trainer.save, 2, asynchronous)
        os.write(report, b"saved\n")


def trial(
    model: str, folder: RunFolder, asynchronous: bool, number: int, rng: random.Random
) -> dict[str, Any]:
    """Kill one writer at a random moment after it completed a save; what it said."""
    wanted = 2 if asynchronous else 1  # a save waits for the thread of the one before
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            writer(model, folder, asynchronous, number, write)
        finally:
            os.write(write, b"failed\n")
            os._exit(1)
    os.close(write)
    said = b""
    while said.count(b"saved") < wanted and b"failed" not in said and b"wrong" not in said:
        ready, _, _ = select.select([read], [], [], 120)
        if not ready:
            break
        said += os.read(read, 4096)
    wait = rng.random() * 1.5
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    said += os.read(read, 65536)
    os.close(read)
    incomplete = [
        p.name
        for p in folder.checkpoints.iterdir()
        if p.name not in {f"step-{s:06d}" for s in folder.steps()}
    ]
    return {
        "said": said.decode().split("\n")[:-1],
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "incomplete": incomplete,
        "steps": folder.steps(),
    }


def main() -> None:
    model, path, trials, asynchronous = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True)
    rng = random.Random(7)
    found = [trial(model, folder, asynchronous, i, rng) for i in range(trials + 1)]
    (path / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
