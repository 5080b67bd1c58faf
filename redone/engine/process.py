"""Processes behind an engine: what they said before they died, and that none stays behind."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
_POINTER = re.compile(r"root cause|stack trace", re.IGNORECASE)


class ErrorLog:
    """Collects the error records of an engine's subprocesses.

    vLLM reports a failed start as "see root cause above"; the cause is in the log of another process. A
    logging configuration, inherited through the environment, copies errors into a file that we can quote.
    """

    def __init__(self, logger: str, level: str) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="redone-engine-"))
        self._file = self._dir / "errors.log"
        self.config_path = self._dir / "logging.json"
        handlers = {
            "stderr": {"class": "logging.StreamHandler", "formatter": "line", "level": level},
            "errors": {
                "class": "logging.FileHandler", "formatter": "line", "level": "ERROR",
                "filename": str(self._file), "delay": True,
            },
        }  # fmt: skip
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(levelname)s %(asctime)s %(processName)s %(message)s"}},
            "handlers": handlers,
            "loggers": {logger: {"handlers": list(handlers), "level": level, "propagate": False}},
        }
        self.config_path.write_text(json.dumps(config))

    def cause(self, lines: int = 4) -> str:
        """The exceptions that processes reported, first one first; "" when none did.

        Lines that only point at another process's log are left out, repetitions too.
        """
        if not self._file.exists():
            return ""
        text = [line.strip() for line in self._file.read_text(errors="replace").splitlines()]
        raised = [line for line in text if _EXCEPTION.match(line) and not _POINTER.search(line)]
        return "\n".join(list(dict.fromkeys(raised))[:lines])

    def close(self) -> None:
        shutil.rmtree(self._dir, ignore_errors=True)


class Children:
    """The descendants of this process that appeared since the object was made."""

    def __init__(self) -> None:
        self._before = {p.pid for p in psutil.Process().children(recursive=True)}
        self._ours: list[psutil.Process] = []

    def remember(self) -> None:
        """Must be called while the parents live: an orphan is no descendant any more."""
        current = psutil.Process().children(recursive=True)
        known = self._before | {p.pid for p in self._ours}
        self._ours += [p for p in current if p.pid not in known and not _is_resource_tracker(p)]

    def end(self, patience_s: float = 5.0) -> None:
        """Wait for them to leave, then kill by pid those that did not."""
        self.remember()
        _, left = psutil.wait_procs(self._ours, timeout=patience_s)
        for process in left:
            log.warning("engine subprocess %d did not leave and was killed", process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=patience_s)
        self._ours = []


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Python's own helper of multiprocessing: it serves this process as long as it lives."""
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return True
