"""Run folders carry the schema version they were written under; another one is refused with the way out
named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from redone.config.schema import SCHEMA_VERSION
from redone.errors import RunFolderError

CONFIG_FILE = "config.yaml"  # the resolved configuration in a run folder

# old version -> what a user does to bring a folder of that version to the next one
MIGRATIONS: dict[int, str] = {}


def check_run_folder(path: str | Path) -> None:
    """Raises RunFolderError when the folder's configuration is absent, unreadable or of another schema
    version."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise RunFolderError(
            f"{path} is no run folder: it has no {CONFIG_FILE}; give the folder that `redone run` made"
        )
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{file} cannot be read: {str(error).splitlines()[0]}; start a new run"
        ) from error
    run = tree.get("run") if isinstance(tree, dict) else None
    found = run.get("schema_version") if isinstance(run, dict) else None
    if found == SCHEMA_VERSION:
        return
    if not isinstance(found, int):
        raise RunFolderError(f"{file}: run.schema_version={found!r}; it must be a number; start a new run")
    if found > SCHEMA_VERSION:
        raise RunFolderError(
            f"{path}: schema version {found} was written by a newer redone (this one reads "
            f"{SCHEMA_VERSION}); upgrade"
        )
    steps = [f"{v} -> {v + 1}: {MIGRATIONS.get(v, 'none exists')}" for v in range(found, SCHEMA_VERSION)]
    raise RunFolderError(
        f"{path}: schema version {found} is older than {SCHEMA_VERSION}; migration {'; '.join(steps)}; "
        "otherwise start a new run"
    )
