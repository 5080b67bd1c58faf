"""What a benchmark's result file says besides its figures: command, commit, machine, load."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from redone.bench.result import commit_of, require_clean
from redone.bench.roofline import processor
from redone.errors import ConfigError


class Record:
    """Made before the measurement: a file is not written from a tree with uncommitted changes."""

    def __init__(self, args: argparse.Namespace, *packages: str) -> None:
        """`packages`: distributions whose versions belong to the result."""
        commit = commit_of()
        if args.out is not None:
            try:
                require_clean(commit, args.allow_dirty)
            except ConfigError as error:
                raise SystemExit(str(error)) from None
        self._out, self._load = args.out, os.getloadavg()[0]
        self._head = {
            "benchmark": f"throughput/{Path(sys.argv[0]).stem}",
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit.id,
            "dirty": bool(commit.dirty),
            "machine": {"processor": processor(), "cores": os.cpu_count()},
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in packages},
            },
        }

    def write(self, figures: dict[str, Any]) -> None:
        load = {"load_before": round(self._load, 1), "load_after": round(os.getloadavg()[0], 1)}
        if self._out is not None:
            text = json.dumps({**self._head, **load, **figures}, indent=1) + "\n"
            self._out.write_text(text, encoding="utf-8")


def arguments(doc: str) -> argparse.ArgumentParser:
    """With --out and --allow-dirty."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; needs a tree without uncommitted changes")
    parser.add_argument("--allow-dirty", action="store_true", help="write it all the same, marked dirty")
    return parser
