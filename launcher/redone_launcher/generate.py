"""`redone generate`: answers of one model to the rows of a file, through the rollout engines alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from redone.config.check import check_config, read_model_config
from redone.config.load import load_config
from redone.data.chat import load_chat
from redone.pipeline.generate import generate
from redone_launcher.session import Session


def generate_command(config: Path, source: Path, target: Path, overrides: Sequence[str]) -> int:
    """Fill `target` up to all rows of `source`; again after an interruption. Raises RedoneError."""
    cfg = load_config(config, overrides)
    check_config(cfg, read_model_config(cfg.model.path), "generate")
    chat = load_chat(cfg.model)
    with tempfile.TemporaryDirectory(prefix="redone-generate-") as logs:
        session = Session(Path(logs))
        finished = False
        try:
            engines = session.engines(cfg, print)
            with engines.awake():
                rows = generate(str(source), target, cfg, chat, engines, _progress)
            finished = True
        finally:
            session.close(graceful=finished)
    print(f"{target}: {rows} rows")
    return 0


def _progress(rows: int) -> None:
    if rows % 1000 == 0:
        print(f"{rows} rows", flush=True)
