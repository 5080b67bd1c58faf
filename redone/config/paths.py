"""The schema as a list of dotted keys: what the loader's suggestions and the generated documentation both
read."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from redone.config.schema import Config

ANY_NAME = "<task>"  # stands for the user's own key in `rewards`
PLACEHOLDERS = {"rewards": ANY_NAME, "nodes": "<node>"}  # in other mappings: <name>


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key that a configuration may set."""

    path: str
    type_text: str
    default: Any  # None when required
    required: bool
    description: str
    variant: str  # "dapo" when the key exists only with algorithm.loss.type=dapo; else ""


def variants_of(annotation: Any, discriminator: str | None) -> tuple[str, dict[str, type[BaseModel]]] | None:
    """(discriminator key, tag -> model) of a discriminated union, else None."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        for item in metadata:
            if isinstance(item, FieldInfo) and isinstance(item.discriminator, str):
                discriminator = item.discriminator
    if discriminator is None or get_origin(annotation) not in (Union, types.UnionType):
        return None
    return discriminator, {
        get_args(model.model_fields[discriminator].annotation)[0]: model for model in get_args(annotation)
    }


def _field_node(info: FieldInfo) -> tuple[Any, str | None]:
    return info.annotation, info.discriminator if isinstance(info.discriminator, str) else None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def type_text(annotation: Any) -> str:
    """A type as the documentation shows it: `int`, `one of a, b`, `list of str`, `float or null`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f"`{a}`" for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_text(a) for a in args)
    if origin is tuple:
        inner = [a for a in args if a is not Ellipsis]
        return (
            f"list of {type_text(inner[0])}"
            if Ellipsis in args
            else f"list of {len(inner)} {type_text(inner[0])}"
        )
    return getattr(annotation, "__name__", str(annotation))


def walk(model: type[BaseModel] = Config, prefix: str = "", variant: str = "") -> Iterator[Key]:
    """Every leaf key below `model`, in schema order; keys of union members once per member."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        annotation, discriminator = _field_node(info)
        if get_origin(annotation) is dict and get_args(annotation)[1] is not object:
            annotation, path = get_args(annotation)[1], f"{path}.{PLACEHOLDERS.get(name, '<name>')}"
        union = variants_of(annotation, discriminator)
        if union is not None:
            yield _variant_key(path, info, *union)
            for tag, member in union[1].items():
                inner = walk(member, f"{path}.", tag)
                yield from (key for key in inner if key.path != f"{path}.{union[0]}")
        elif _is_section(annotation):
            yield from walk(annotation, f"{path}.", variant)
        else:
            yield Key(
                path=path,
                type_text=type_text(annotation),
                default=None if info.is_required() else info.get_default(call_default_factory=True),
                required=info.is_required(),
                description=info.description or "",
                variant=variant,
            )


def _variant_key(path: str, info: FieldInfo, discriminator: str, members: dict[str, type[BaseModel]]) -> Key:
    default = getattr(info.default, discriminator, None)
    return Key(
        path=f"{path}.{discriminator}",
        type_text="one of " + ", ".join(f"`{tag}`" for tag in members),
        default=default,
        required=default is None,
        description="Which variant; keys below marked with names exist for those only.",
        variant="",
    )


def known_keys(names: Sequence[str] = ()) -> tuple[str, ...]:
    """All leaf paths, once each, with `<task>` replaced by each of the user's names."""
    found: dict[str, None] = {}
    for key in walk():
        if ANY_NAME in key.path:
            for name in names or (ANY_NAME,):
                found[key.path.replace(ANY_NAME, name)] = None
        else:
            found[key.path] = None
    return tuple(found)


def user_path(location: Sequence[int | str]) -> tuple[str, ...]:
    """pydantic's error location without the tags that it inserts for discriminated unions."""
    annotation: Any = Config
    discriminator: str | None = None
    path: list[str] = []
    for part in location:
        union = variants_of(annotation, discriminator)
        if union is not None:
            annotation, discriminator = union[1].get(str(part)), None
            continue
        path.append(str(part))
        if get_origin(annotation) is dict and get_args(annotation)[1] is not object:
            annotation, discriminator = get_args(annotation)[1], None
        elif _is_section(annotation) and str(part) in annotation.model_fields:
            annotation, discriminator = _field_node(annotation.model_fields[str(part)])
        else:
            annotation, discriminator = None, None
    return tuple(path)


def field_at(path: Sequence[str]) -> FieldInfo | None:
    """The schema field of a dotted path outside unions and mappings, or None."""
    model: Any = Config
    info: FieldInfo | None = None
    for part in path:
        if not _is_section(model) or part not in model.model_fields:
            return None
        info = model.model_fields[part]
        model = info.annotation
    return info


def variants_with(path: str) -> tuple[str, ...]:
    """Tags of the union members that have this key (`rewards.<name>.x` counts as `rewards.<task>.x`)."""
    parts = path.split(".")
    if parts[0] == "rewards" and len(parts) > 2:
        parts = [parts[0], ANY_NAME, *parts[2:]]
    return tuple(key.variant for key in walk() if key.path == ".".join(parts) and key.variant)
