"""docs/config.md from the schema: every key with type, default and meaning, and verl's names beside ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from redone.config.paths import Key, walk
from redone.config.schema import Config
from redone.config.verl_keys import NO_COUNTERPART, REFUSED, RENAMED

_HEAD = """# Configuration

Generated from `redone/config/schema.py` by `redone docs` (a test keeps it current); do not edit.

A configuration is a YAML file of the sections below; `redone run CONFIG a.b=value` overrides single keys,
with values read as YAML. Unknown keys are errors. A top-level list `base: [other.yaml]` (relative to the
file) is read first: later values win, mappings merge, and a mapping that names another `type` or `family`
replaces the one below it. `${section.key}` refers to another key that the file sets, and
`${oc.env:NAME,default}` to the environment. Relative paths in values are relative to the working directory.
The resolved configuration of a run is `config.yaml` in its folder.
"""


def render() -> str:
    """The whole document; equal input gives equal text."""
    parts = [_HEAD]
    for section, info in Config.model_fields.items():
        keys = [key for key in walk() if key.path.split(".")[0] == section]
        parts.append(f"## {section}\n\n" + "\n".join(_table(keys)) + "\n")
        if info.description:
            parts[-1] = parts[-1].replace("\n\n", f"\n\n{info.description}\n\n", 1)
    parts.append("\n".join(_verl()) + "\n")
    return "\n".join(parts)


def _table(keys: list[Key]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in _merged(keys):
        only = f"({key.variant}) " if key.variant else ""
        default = "required" if key.required else f"`{_shown(key.default)}`"
        cells = (f"`{key.path}`", key.type_text, default, only + key.description)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _merged(keys: list[Key]) -> list[Key]:
    """Union members that agree on a key share its line; the line names the members."""
    lines: dict[tuple[str, str, str, str], tuple[Key, list[str]]] = {}
    for key in keys:
        same = (key.path, key.type_text, repr(key.default), key.description)
        lines.setdefault(same, (key, []))[1].append(key.variant)
    return [
        Key(
            path=key.path,
            type_text=key.type_text,
            default=key.default,
            required=key.required,
            description=key.description,
            variant=", ".join(v for v in variants if v),
        )
        for key, variants in lines.values()
    ]


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False)


def _verl() -> Iterator[str]:
    yield "## Coming from verl"
    yield ""
    yield "These keys are refused with their name here; nothing is translated in silence."
    yield ""
    yield "| verl | redone | note |"
    yield "|---|---|---|"
    for theirs, (ours, note) in sorted(RENAMED.items()):
        yield f"| `{theirs}` | `{ours}` | {note} |"
    for theirs, reason in sorted(NO_COUNTERPART.items()):
        yield f"| `{theirs}` | | {reason} |"
    yield ""
    yield "Not supported, refused wherever the name stands in a key:"
    yield ""
    for reason in dict.fromkeys(REFUSED.values()):
        names = ", ".join(f"`{name}`" for name, why in REFUSED.items() if why == reason)
        yield f"- {names}: {reason}"
