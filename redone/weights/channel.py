"""Channels. Here: one file that holds the whole weight space, mapped by trainer and engines.

weights.channel=shm keeps it in shared memory, for one node. weights.channel=file keeps it in a folder that
all nodes share: the writer flushes it before the engines hear of it, every engine opens it anew for every
version (which is what makes a network file system show the new bytes), and digests find what it did not show.

weights.channel=collective (redone.weights.collective) sends the bytes of such a file to the engines.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from redone.errors import SyncError

if TYPE_CHECKING:
    from redone.config.schema import WeightsConfig

log = logging.getLogger(__name__)

SHM_DIR_VARIABLE = "REDONE_SHM_DIR"
_OWNED = re.compile(r"^redone-(\d+)-")


def channel_dir(cfg: WeightsConfig) -> Path:
    """REDONE_SHM_DIR, else weights.dir, else /dev/shm."""
    return Path(os.environ.get(SHM_DIR_VARIABLE) or cfg.dir or "/dev/shm")


def channel_path(cfg: WeightsConfig, run_id: str) -> str:
    """Where the run's weight space lives.

    Args:
        run_id: begins with the pid of the process that outlives the run ("1234-name"), which is how
            sweep_stale tells the files of dead runs.
    """
    return str(channel_dir(cfg) / f"redone-{run_id}")


def location_of(cfg: WeightsConfig, run_folder: Path, run_name: str) -> str:
    """Where the weight space of a run lives: named by the driver's pid (shm), or by the run folder (file).

    A run folder has one live run, so a file that a dead run left is taken over and removed by the next one.
    """
    if cfg.channel != "file":
        return channel_path(cfg, f"{os.getpid()}-{run_name}")
    assert cfg.dir is not None
    folder = Path(cfg.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SyncError(
            f"weights.dir={folder}: {error.strerror}; name a folder that all nodes share"
        ) from None
    key = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:12]
    return str(folder / f"redone-weights-{run_name}-{key}")


def sweep_stale(cfg: WeightsConfig) -> list[str]:
    """Remove `redone-<pid>-*` files of this user whose process is dead and that no writer holds.

    The lock that every ShmWriter holds protects files of a process in another pid namespace (a container
    that shares /dev/shm), whose pid looks dead from here. Returns the removed paths.
    """
    removed: list[str] = []
    directory = channel_dir(cfg)
    if cfg.channel == "file" or not directory.is_dir():  # pids of other nodes say nothing here
        return removed
    for path in directory.iterdir():
        match = _OWNED.match(path.name)
        if match is None or _alive(int(match.group(1))):
            continue
        try:
            if path.stat().st_uid != os.getuid() or _locked(path):
                continue
            path.unlink()
        except FileNotFoundError:
            continue  # another run sweeps at the same time
        log.info("removed %s, left by a dead run", path)
        removed.append(str(path))
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class _Mapping:
    """total_bytes of a file as one torch.uint8 tensor."""

    def __init__(self, location: str, total_bytes: int) -> None:
        self.location, self.total_bytes = location, total_bytes
        self._bytes: torch.Tensor | None = None
        self._memory: mmap.mmap | None = None

    def _map(self, fd: int) -> None:
        # torch.frombuffer refuses read-only buffers; readers never write.
        self._memory = mmap.mmap(fd, self.total_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8, sharing memory with the file. Raises SyncError outside the weight space."""
        if self._bytes is None:
            raise SyncError(f"weight channel {self.location} is closed")
        if offset < 0 or offset + nbytes > self.total_bytes:
            raise SyncError(
                f"weight channel {self.location}: [{offset}, {offset + nbytes}) is outside its "
                f"{self.total_bytes} bytes"
            )
        return self._bytes[offset : offset + nbytes]

    def close(self) -> None:
        """Drop the mapping; the memory goes when the last view of it does."""
        self._bytes = self._memory = None


class ShmWriter(_Mapping):
    """Creates (or attaches to) the file and reserves its memory at once.

    Raises:
        SyncError: the file system has less free space than the weight space needs. Reserving first turns what
            would be a SIGBUS in the middle of a write into this message.
    """

    def __init__(self, location: str, total_bytes: int) -> None:
        super().__init__(location, total_bytes)
        directory = os.path.dirname(location) or "."
        if not os.path.isdir(directory):
            raise SyncError(
                f"weight channel: folder {directory} does not exist; create it or change weights.dir"
            )
        self._fd = os.open(location, os.O_RDWR | os.O_CREAT, 0o600)
        held = os.fstat(self._fd)
        fs = os.fstatvfs(self._fd)
        free = fs.f_bavail * fs.f_frsize
        # An attached file already holds its blocks.
        need = total_bytes - min(held.st_blocks * 512, total_bytes)
        if free < need:
            self._refuse(directory, need, free, remove=held.st_size == 0)
        if held.st_size > total_bytes:
            os.ftruncate(self._fd, total_bytes)
        try:
            os.posix_fallocate(self._fd, 0, total_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self._refuse(directory, need, free, remove=held.st_size == 0)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        self._map(self._fd)

    def _refuse(self, directory: str, need: int, free: int, remove: bool) -> None:
        os.close(self._fd)
        if remove:
            os.unlink(self.location)
        raise SyncError(
            f"weight channel: {directory} has {free} bytes free, the weights need {need}. Remedy: set "
            f"weights.dir or {SHM_DIR_VARIABLE} to a folder with room (in a container: a larger --shm-size)"
        )

    def begin(self) -> str:
        """Before a publication; returns the address that its buckets carry."""
        return self.location

    def announce(self, offset: int, nbytes: int) -> None:
        """A bucket is complete: make it visible to those who will hear of it. Here it is."""

    def finish(self) -> None:
        """After a publication's last bucket."""

    def close(self, keep: bool = False) -> None:
        """Unmap, release the lock and (unless `keep`) remove the file; safe to call twice."""
        if self._bytes is None:
            return
        super().close()
        os.close(self._fd)
        if not keep and os.path.exists(self.location):
            os.unlink(self.location)


class ShmReader(_Mapping):
    """Maps what a ShmWriter wrote. Raises SyncError when the file is missing or has another size."""

    def __init__(self, location: str, total_bytes: int) -> None:
        super().__init__(location, total_bytes)
        if not os.path.exists(location):
            raise SyncError(f"weight channel {location} does not exist: is the trainer on another node?")
        fd = os.open(location, os.O_RDWR)
        try:
            size = os.fstat(fd).st_size
            if size != total_bytes:
                raise SyncError(
                    f"weight channel {location} has {size} bytes, the weight plan says {total_bytes}"
                )
            self._map(fd)
        finally:
            os.close(fd)

    def fetch(self, index: int) -> None:
        """Before a bucket is read: the file holds them all."""


class FileWriter(ShmWriter):
    """weights.channel=file: what was written reaches the file system before the engines hear of it."""

    def announce(self, offset: int, nbytes: int) -> None:
        if self._memory is not None:
            self._memory.flush()
