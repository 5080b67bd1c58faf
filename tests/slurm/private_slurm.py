"""A private SLURM on this host: munged, one slurmctld, N slurmd, with ports, folders and pids of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CPUS = 16  # that every node claims: jobs share nodes
GPUS = 8

CONF = """\
ClusterName=redone-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=7200
KillWait=10
Waittime=0
JobRequeue=1
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
GresTypes=gpu
"""


@dataclass
class PrivateSlurm:
    """Started by start(); stop() ends exactly the daemons that it started."""

    nodes: int = 4
    root: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sl", dir="/tmp")))

    @property
    def env(self) -> dict[str, str]:
        """For every client: commands and jobs."""
        return {**os.environ, "SLURM_CONF": str(self.root / "etc/slurm.conf")}

    def start(self) -> None:
        missing = [p for p in PROGRAMS if shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin") is None]
        assert not missing, f"{', '.join(missing)} missing: make system-packages (apt: slurm-wlm, munge)"
        assert os.geteuid() == 0, "a private SLURM needs root: its daemons start processes for users"
        for part in ("etc", "run", "log", "state", "dev"):
            (self.root / part).mkdir(parents=True)
        self.root.chmod(0o755)
        self._configure(free_window(self.nodes + 2))
        self._run("mungekey", "-c", "-k", self._path("etc/munge.key"))
        self._run(
            "munged", f"--key-file={self._path('etc/munge.key')}", f"--socket={self._path('run/munge.sock')}",
            f"--pid-file={self._path('run/munged.pid')}", f"--log-file={self._path('log/munged.log')}",
            f"--seed-file={self._path('run/munge.seed')}", "--num-threads=4",
        )  # fmt: skip
        self._run("slurmctld", "-f", self._path("etc/slurm.conf"), "-c")
        for i in range(1, self.nodes + 1):
            self.start_node(f"node{i}")
        self.wait_for_idle(self.nodes)

    def _configure(self, port: int) -> None:
        host = socket.gethostname().split(".")[0]
        lines, gres = [CONF.format(host=host, port=port, root=self.root)], ["AutoDetect=off"]
        for i in range(1, self.nodes + 1):
            name, devices = f"node{i}", self.root / "dev" / f"node{i}"
            (self.root / "spool" / name).mkdir(parents=True)
            devices.mkdir()
            for g in range(GPUS):  # SLURM looks for character devices: /dev/null by another name
                os.mknod(devices / f"gpu{g}", 0o020666, os.makedev(1, 3))
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + i} CPUs={CPUS} "
                f"RealMemory=16000 Gres=gpu:h100:{GPUS} State=UNKNOWN\n"
            )
            gres.append(
                f"NodeName={name} Name=gpu Flags=nvidia_gpu_env Type=h100 File={devices}/gpu[0-{GPUS - 1}]"
            )
        lines.append(
            f"PartitionName=debug Nodes=node[1-{self.nodes}] Default=YES MaxTime=INFINITE State=UP\n"
        )
        (self.root / "etc/slurm.conf").write_text("".join(lines))
        (self.root / "etc/gres.conf").write_text("\n".join(gres) + "\n")

    def _path(self, part: str) -> str:
        return str(self.root / part)

    def _run(self, program: str, *args: str) -> str:
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
        done = subprocess.run(
            [str(path), *args], env=self.env, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, f"{program} {args}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_node(self, name: str) -> None:
        self._run("slurmd", "-N", name, "-f", self._path("etc/slurm.conf"))

    def wait_for_idle(self, count: int, timeout_s: float = 40.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(count):
                return
            time.sleep(0.1)
        raise AssertionError(self._run("sinfo", "-N", "-l"))

    def kill_node(self, name: str) -> None:
        """As if the power went: slurmd of `name` and every process of its jobs, at once."""
        daemon = psutil.Process(int((self.root / f"run/slurmd-{name}.pid").read_text()))
        daemon.kill()
        # First what would still report: slurmstepd, known by the tasks that it started.
        tasks, reporters = [], []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURMD_NODENAME") == name and self._is_ours(process):
                    tasks.append(process)
                    parent = process.parent()
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        reporters.append(parent)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        for process in [*reporters, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _is_ours(self, process: psutil.Process) -> bool:
        return process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]

    def processes(self) -> list[str]:
        """Live processes of jobs (not the daemons) of this SLURM."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            try:
                ours = "SLURM_JOB_ID" in process.environ() and self._is_ours(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.info['cmdline'] or [])[:100]}")
        return found

    def pids(self) -> list[int]:
        return [
            int(f.read_text()) for f in sorted((self.root / "run").glob("*.pid")) if f.read_text().strip()
        ]

    def stop_controller(self) -> None:
        """slurmctld stops answering: commands wait, as with a dead controller."""
        os.kill(int((self.root / "run/slurmctld.pid").read_text()), signal.SIGSTOP)

    def continue_controller(self) -> None:
        os.kill(int((self.root / "run/slurmctld.pid").read_text()), signal.SIGCONT)

    def stop(self) -> None:
        """End the daemons: what they started first, then themselves, by the pids that they wrote."""
        self.continue_controller()
        subprocess.run(["scancel", "--user=root"], env=self.env, timeout=20, check=False)
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        daemons = [psutil.Process(pid) for pid in self.pids() if psutil.pid_exists(pid)]
        for process in daemons:
            process.terminate()
        _, left = psutil.wait_procs(daemons, timeout=8)
        for process in left:
            process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


def free_window(count: int) -> int:
    """First of `count` neighbouring ports that nobody listens on, below the ephemeral range."""
    for first in range(21000 + os.getpid() % 40 * 100, 30000, 20):
        if all(_is_free(first + i) for i in range(count)):
            return first
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
