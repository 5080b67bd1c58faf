"""SLURM's commands with a time-out each, and their failures as sentences."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from redone.errors import RedoneError

TIMEOUT_S = 20.0
# man squeue, "JOB STATE CODES"; every other word (also SIGNALING, STAGE_OUT, ...) is of a job that goes on.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
    "?",  # ours: scontrol named none
)  # fmt: skip
_INSTALL = "run this on a login node of the cluster (or install slurm-wlm)"


class SlurmError(RedoneError):
    """SLURM did not answer, or refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """What sinfo says of a partition."""

    name: str
    nodes: int
    cpus: int  # of its largest node
    gpus: int  # of its largest node
    gres: tuple[str, ...]  # as sinfo prints them


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """`state` is SLURM's word (RUNNING, PENDING, ...); `reason` why it waits or how it ended."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def live(self) -> bool:
        return self.state not in ENDED


def slurm(command: Sequence[str], timeout_s: float | None = None) -> str:
    """Standard output of a SLURM command.

    Raises SlurmError when it is not installed, does not answer in time (a dead slurmctld makes every command
    wait for minutes) or fails.
    """
    limit = timeout_s or float(os.environ.get("REDONE_SLURM_TIMEOUT_S", TIMEOUT_S))
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed here; {_INSTALL}") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer in {limit:.0f} s: slurmctld is down or out of reach "
            "(scontrol ping); try again later"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if "Unable to contact" in said or "Connection refused" in said:
            said += "; slurmctld is down or out of reach (scontrol ping)"
        raise SlurmError(f"{command[0]}: {said}")
    return done.stdout


def partitions() -> dict[str, Partition]:
    """Every partition that sinfo shows, by name; the default one also under ''."""
    rows: dict[str, list[tuple[int, int, int, str]]] = {}
    default = ""
    for line in slurm(["sinfo", "--noheader", "--format=%P|%D|%c|%G"]).splitlines():
        name, nodes, cpus, gres = line.strip().split("|")
        if name.endswith("*"):
            name = default = name.rstrip("*")
        rows.setdefault(name, []).append((int(nodes), int(cpus.rstrip("+")), gpus_in(gres), gres))
    found = {
        name: Partition(
            name=name,
            nodes=sum(r[0] for r in lines),
            cpus=max(r[1] for r in lines),
            gpus=max(r[2] for r in lines),
            gres=tuple(dict.fromkeys(r[3] for r in lines)),
        )
        for name, lines in rows.items()
    }
    return {**found, "": found[default]} if default else found


def gpus_in(gres: str) -> int:
    """`gpu:h100:8(S:0-1),shard:4` -> 8."""
    counts = re.findall(r"(?:^|,)gpu(?::[A-Za-z][\w.-]*)?:(\d+)", gres)
    return sum(int(n) for n in counts)


def job_state(job: str) -> JobState | None:
    """What the controller knows of a job, else the accounting, else None (it forgot; MinJobAge)."""
    try:
        text = slurm(["scontrol", "--oneliner", "show", "job", job])
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(job)
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    return JobState(
        state=fields.get("JobState", "?"),
        reason=fields.get("Reason", "").replace("None", ""),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        restarts=int(fields.get("Restarts", "0")),
    )


def _accounted(job: str) -> JobState | None:
    try:
        text = slurm(
            ["sacct", "--noheader", "--parsable2", "-X", "--format=State,ExitCode,NodeList", "-j", job]
        )
    except SlurmError:
        return None  # no accounting on this cluster
    rows = [line.split("|") for line in text.splitlines() if line.strip()]
    if not rows:
        return None
    state, code, nodes = rows[-1][:3]
    return JobState(state=state.split()[0], reason=f"exit code {code}", nodes=nodes)
