"""site.env: what a cluster is like, as shell assignments that the job script sources and this file checks."""

from __future__ import annotations

import difflib
import os
import subprocess
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redone.errors import ConfigError

PREFIX = "REDONE_"
EXAMPLE = "slurm/site.env.example"
_SOURCE_S = 20.0
_OTHERS = ("REDONE_ASSETS", "REDONE_DATA", "REDONE_SHM_DIR")  # read elsewhere; a site.env may set them


class Site(BaseModel):
    """The REDONE_* keys of a site.env; every one is described in slurm/site.env.example."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = Field("04:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    signal_lead_s: int = Field(600, ge=5)
    max_attempts: int = Field(10, ge=1)
    mem: str | None = None
    cpus_per_node: int | None = Field(None, ge=1)
    gpu: str | None = None
    gpu_type: str | None = None
    sbatch_args: str = ""
    launch: Literal["venv", "pyxis", "apptainer"] = "venv"
    python: str | None = None
    modules: str = ""
    image: str | None = None
    mounts: str = ""
    scratch: str = Field("/tmp", max_length=40)
    shared: str | None = None
    interface: str | None = None
    port_base: int = Field(17000, ge=1024, le=31000)
    node_check: str = ""
    min_ram_gb: float = Field(0.0, ge=0)
    min_shm_gb: float = Field(0.0, ge=0)
    max_skew_s: float = Field(2.0, gt=0)
    expect_copy_gbs: float = Field(0.0, ge=0)
    expect_allreduce_gbs: float = Field(0.0, ge=0)


def read_site(path: Path) -> Site:
    """Source `path` with bash and check its REDONE_* keys. Raises ConfigError with file, key and remedy."""
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ConfigError(
            f"--site {path}: {reason}; copy {EXAMPLE} to it and fill it in, or name another file"
        ) from None
    return site_from(_source(path), str(path))


def _source(path: Path) -> dict[str, str]:
    """Variables that the file sets. The job script will source the same file with the same shell."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    try:
        done = subprocess.run(
            ["bash", "-c", 'set -ea; . "$1" >/dev/null; env -0', "site", str(path.resolve())],
            env=clean, capture_output=True, text=True, timeout=_SOURCE_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"--site {path}: still running after {_SOURCE_S:.0f} s; it must only assign"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(f"--site {path}: bash cannot source it: {said[-1] if said else 'no message'}")
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
    return {name: value for name, _, value in pairs if clean.get(name) != value}


def site_from(variables: dict[str, str], source: str) -> Site:
    """The site of these shell variables; an empty value means the default. Raises ConfigError."""
    ours = {k: v for k, v in variables.items() if k.startswith(PREFIX) and k not in _OTHERS}
    known = {PREFIX + name.upper(): name for name in Site.model_fields}
    for key in ours:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"{EXAMPLE} lists every key"
            raise ConfigError(f"{source}: unknown key {key}; {remedy}")
    try:
        site = Site.model_validate({known[k]: v for k, v in ours.items() if v != ""})
    except ValidationError as error:
        first = error.errors()[0]
        key = PREFIX + str(first["loc"][0]).upper()
        raise ConfigError(f"{source}: {key}={first['input']!r}: {first['msg']}; see {EXAMPLE}") from None
    if site.launch != "venv" and not site.image:
        raise ConfigError(f"{source}: REDONE_LAUNCH={site.launch} needs REDONE_IMAGE; see {EXAMPLE}")
    return site
