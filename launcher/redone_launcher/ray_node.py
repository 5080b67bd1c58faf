"""One Ray node of a job: `ray start --block` with this job's ports, token and temporary folder.

Ray's own `ray stop` ends every Ray process of the host by name; this process ends the one it started.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from redone.cluster.actors import NODE_GPUS, redirect_output
from redone.errors import RedoneError

SERVICES = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
PORTS_PER_JOB = 256
PORTS_PER_NODE = 16  # of the job's window; only "nodes" that share a host need different ones
MARK = "REDONE_RAY_NODE"
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STARTED = "Ray runtime started"
START_ATTEMPTS = 3  # Ray gives its processes 30 s to come up; on a cold file system imports take longer
NODE_ENV = {
    "PYTHONUNBUFFERED": "1",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # 30 s of waiting after SIGTERM, for Ray Serve
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_prestart_worker_first_driver": "0",  # one idle process per logical CPU otherwise
    "RAY_enable_worker_prestart": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Arguments of `redone node`."""

    nodes: tuple[str, ...]  # the job's, in order; the first is the head
    ports: int  # first port of the job's window
    scratch: str
    cpus: int
    object_store_mb: int
    address_file: Path
    head: bool


def node_name() -> str:
    """SLURM's name of this node: several slurmd may share a host and its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def interface_address(name: str) -> str:
    """IPv4 address of a network interface. Raises RedoneError naming those that exist."""
    found = psutil.net_if_addrs()
    for address in found.get(name, ()):
        if address.family == socket.AF_INET:
            return str(address.address)
    raise RedoneError(
        f"REDONE_INTERFACE={name}: no such interface with an IPv4 address on {node_name()}; it has "
        f"{', '.join(sorted(found))}"
    )


def own_address() -> str:
    """The address other nodes reach this one at: REDONE_INTERFACE's, else that of the default route."""
    if interface := os.environ.get("REDONE_INTERFACE"):
        return interface_address(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the kernel only picks a source address
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def free_ports(first: int, window: int, start: int, count: int) -> list[int]:
    """`count` ports of [first, first + window) that nobody listens on, from `start` round the window.

    Raises RedoneError when there are fewer.
    """
    found: list[int] = []
    for i in range(window):
        port = first + (start + i) % window
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RedoneError(
        f"{node_name()}: {len(found)} of the ports {first}..{first + window - 1} are free, {count} needed; "
        "remedy: another REDONE_PORT_BASE in site.env"
    )


def start_command(
    options: NodeOptions, address: str | None, ports: Sequence[int], temp_dir: str
) -> list[str]:
    """`ray start` for the head (address None: on port ports[0]) or for another node."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if options.head:
        command += ["--head", f"--port={ports[0]}", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
    else:
        command += [f"--address={address}"]
    command.append(f"--node-ip-address={own_address()}")
    command += [f"--{name}={port}" for name, port in zip(SERVICES, ports[1:], strict=True)]
    gpus = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    return [
        *command,
        "--min-worker-port=0",  # 0: the kernel chooses, so that jobs on one node never collide
        "--max-worker-port=0",
        f"--num-cpus={options.cpus}",
        f"--num-gpus={len(gpus)}",
        f"--object-store-memory={options.object_store_mb << 20}",
        "--include-log-monitor=false",
    ]


def ray_folder(scratch: str, address_file: Path) -> str:
    """Ray's folder of one attempt, the same on all nodes; short, because of its sockets."""
    return f"{scratch}/rd{hashlib.sha256(str(address_file.absolute()).encode()).hexdigest()[:12]}"


def run_node(options: NodeOptions) -> int:
    """Start the Ray node, wait for its end, remove its folder. Returns Ray's exit code."""
    index = options.nodes.index(node_name())
    redirect_output(str(options.address_file.parent / f"ray-{node_name()}.log"), "info")
    temp_dir = ray_folder(options.scratch, options.address_file)
    address = None if options.head else options.address_file.read_text().strip()
    env = {**os.environ, **{k: os.environ.get(k, v) for k, v in NODE_ENV.items()}}
    mark = env[MARK] = f"{os.environ.get('SLURM_JOB_ID', '')}-{node_name()}-{os.getpid()}"
    env[NODE_GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if interface := os.environ.get("REDONE_INTERFACE"):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            env.setdefault(variable, interface)

    def end(number: int, frame: FrameType | None) -> None:
        for one in END_SIGNALS:  # SLURM and the job script both send one
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for one in END_SIGNALS:
        signal.signal(one, end)
    try:
        for _ in range(START_ATTEMPTS):
            ports = free_ports(options.ports, PORTS_PER_JOB, index * PORTS_PER_NODE, len(SERVICES) + 1)
            command = start_command(options, address, ports, temp_dir)
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
            )
            if _follow(process, options, ports[0]):
                break
            end_marked(mark)
        return process.wait()
    finally:
        if options.head:
            options.address_file.unlink(missing_ok=True)
        end_marked(mark)
        shutil.rmtree(temp_dir, ignore_errors=True)


def end_marked(mark: str) -> None:
    """End every process that carries `mark` in its environment: this Ray node's and its actors', no other's.

    At once: the run is over, and SLURM itself leaves little time. A raylet's workers outlive it for a while,
    and find themselves under another parent.
    """
    for _ in range(5):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not found:
            return
        psutil.wait_procs(found, timeout=2)


def _follow(process: subprocess.Popen[str], options: NodeOptions, port: int) -> bool:
    """Copy what Ray says until it ends. False: it ended before its node was up."""
    started = False
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        if not started and STARTED in line:
            started = True
            if options.head:
                _announce(options.address_file, f"{own_address()}:{port}")
    return started


def _announce(file: Path, address: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(address + "\n")
    os.replace(partial, file)
