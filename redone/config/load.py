"""A YAML file and `a.b=c` overrides become one frozen Config, or one ConfigError that lists every problem."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from redone.config.paths import field_at, known_keys, user_path, variants_of, variants_with
from redone.config.schema import SCHEMA_VERSION, Config, RewardConfig
from redone.config.verl_keys import explain
from redone.errors import ConfigError, first_line

MAX_SHOWN = 15
_DISCRIMINATORS = ("type", "family", "kind")
_DEFAULT_TYPES = (("algorithm", "loss", "dapo"), ("rollout", "engine", "vllm"))  # section, key, its type
_FAMILIES = ", ".join(variants_of(RewardConfig, None)[1])  # type: ignore[index]
_LIMITS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_WANTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list, e.g. [a, b]",
    "finite": "a finite number",
    "model": "a section (key: value lines)",
    "dict": "a mapping (key: value lines)",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (and the files of its top-level `base:` list, relative to it), apply overrides, validate.

    Raises ConfigError: one message with every problem, each with key, value and remedy. Relative paths
    inside the
    configuration stay as written; relations between sections are checked by check.check_config.
    """
    return build_config(_read(Path(path), ()), overrides, str(path))


def build_config(tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Config:
    """`tree` with `a.b=c` overrides on it, validated. Raises ConfigError."""
    merged = merge(tree, _parse_overrides(overrides))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(merged), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "?"
        raise ConfigError(
            f"{source}: cannot resolve {key}: {first_line(error)}; set it in the file"
        ) from error
    return config_from_dict(cast(dict[str, Any], resolved), source)


def config_from_dict(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate plain containers. Raises ConfigError."""
    values = _default_variants(values)
    version = (values.get("run") or {}).get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{source}: run.schema_version={version}, but this redone reads {SCHEMA_VERSION}; remove "
            "the key and adapt the file to docs/config.md"
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(p for e in error.errors() for p in _problems(e, values)))
        raise ConfigError(format_problems(source, problems)) from error


def dump_config(cfg: Config, path: str | Path) -> None:
    """Write the resolved configuration atomically; load_config(path) gives an equal Config."""
    # OmegaConf's own writer quotes what its reader would take for a number (1e3), which PyYAML's does not.
    text = OmegaConf.to_yaml(OmegaConf.create(_escape(cfg.model_dump(mode="json"))))
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)


def format_problems(source: str, problems: Sequence[str]) -> str:
    """One message: a single problem on the source's line, several as a list (cut at MAX_SHOWN)."""
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    rest = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    return "\n".join(
        [f"{source}: {len(problems)} problems", *(f"  - {p}" for p in (*problems[:MAX_SHOWN], *rest))]
    )


def unknown_key(path: str, names: Sequence[str] = ()) -> str:
    """The message for a key that the schema lacks: ours for a verl name, the reason of a refusal, or the
    nearest."""
    remedy = explain(path)
    if remedy is None and (elsewhere := variants_with(path)):
        remedy = f"it exists only for the variants {', '.join(elsewhere)}"
    if remedy is None:
        nearest = _nearest(path, known_keys(names))
        remedy = f"did you mean {nearest}?" if nearest else "docs/config.md lists every key"
    return f"unknown key {path}; {remedy}"


def _nearest(path: str, known: Sequence[str]) -> str | None:
    leaf = path.rpartition(".")[2]

    def closeness(candidate: str) -> float:
        same_leaf = 0.25 if candidate.rpartition(".")[2] == leaf else 0.0
        return difflib.SequenceMatcher(None, path, candidate).ratio() + same_leaf

    best = max(known, key=closeness)
    return best if closeness(best) >= 0.6 else None


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in including:
        raise ConfigError(f"{path}: `base` includes itself ({' -> '.join(map(str, including))})")
    if not path.is_file():
        by = f" (in `base` of {including[-1]})" if including else ""
        raise ConfigError(f"no configuration file {path}{by}; configs/ holds examples")
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: holds a list; a configuration is a mapping of sections")
    own = cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))
    bases = own.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: base={bases!r} must be a list of files, e.g. [common.yaml]")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read(path.parent / base, (*including, path.resolve())))
    return merge(merged, own)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r} must have the form a.b=value")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: not a YAML value: {first_line(error)}") from error
        nested: Any = cast(dict[str, Any], parsed)["value"]
        for part in reversed(key.split(".")):
            nested = {part: nested}
        tree = merge(tree, cast(dict[str, Any], nested))
    return tree


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge, anything else is replaced. A mapping that names another variant replaces the whole
    mapping:
    the numbers of a DAPO loss do not survive under a GSPO loss."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if not isinstance(old, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
        elif any(tag in old and tag in value and old[tag] != value[tag] for tag in _DISCRIMINATORS):
            merged[key] = dict(value)
        else:
            merged[key] = merge(old, value)
    return merged


def _default_variants(values: Mapping[str, Any]) -> dict[str, Any]:
    """algorithm.loss and rollout.engine without `type` keep their default, so that one of its keys can be
    set alone."""
    filled = dict(values)
    for section, key, default in _DEFAULT_TYPES:
        holder = filled.get(section)
        if isinstance(holder, Mapping) and isinstance(holder.get(key), Mapping):
            filled[section] = {**holder, key: {"type": default, **holder[key]}}
    return filled


def _problems(error: ErrorDetails, values: Mapping[str, Any]) -> Iterator[str]:
    """One pydantic error as messages for the user (an unknown section yields one per leaf in it)."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    parts = user_path(error["loc"])
    path = ".".join(parts)
    rewards = values.get("rewards")
    names = [str(name) for name in rewards] if isinstance(rewards, Mapping) else []
    if kind == "extra_forbidden":
        for leaf in _leaves(path, value):
            yield unknown_key(leaf, names)
    elif kind == "missing":
        field = field_at(parts)
        yield f"{path} is required" + (f": {field.description}" if field and field.description else "")
    elif kind == "union_tag_not_found":
        yield f"{path}.{_bare(context['discriminator'])} is required; {_choices(path)}"
    elif kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "")
        yield f"{path}.{_bare(context['discriminator'])}={context['tag']}; use one of {tags}"
    elif kind == "literal_error":
        expected = context["expected"].replace(" or ", ", ").replace("'", "")
        yield f"{path}={_shown(value)}; use one of {expected}"
    elif kind in _LIMITS:
        name, sign = _LIMITS[kind]
        yield f"{path}={_shown(value)}; it must be {sign} {context[name]}"
    elif kind == "string_pattern_mismatch":
        yield f"{path}={_shown(value)}; it must match {context['pattern']}"
    elif kind == "value_error":
        yield f"{path + ': ' if path else ''}{context['error']}"
    else:
        wanted = _WANTED.get(kind.partition("_")[0])
        yield f"{path}={_shown(value)}; " + (f"it must be {wanted}" if wanted else error["msg"])


def _choices(path: str) -> str:
    return f"use one of {_FAMILIES}" if path.startswith("rewards.") else "docs/config.md lists the choices"


def _leaves(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    else:
        yield path


def _bare(name: str) -> str:
    return name.strip("'")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _escape(value: Any) -> Any:
    """Texts that hold `${` are data once resolved: escape them, so that loading does not resolve them
    again."""
    if isinstance(value, dict):
        return {k: _escape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_escape(v) for v in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value
