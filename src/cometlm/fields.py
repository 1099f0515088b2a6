"""YAML files as typed fields: plain values become the dataclasses that declare them.

`cometlm train` and `cometlm eval` have their configurations from here. A field's declared type says
what it takes: dataclasses, `tuple`, `dict`, `Literal`, unions, and plain types.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cometlm.text_file import read_text

T = TypeVar("T")


class _OnceLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice under one field."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """See `yaml.composer.Composer`."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in lines:
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"{key.value} stands twice, first in line {lines[key.value]}",
                    key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        return node


def read_fields(
    path: str | Path,
    changes: Sequence[str] = (),
    whole: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """What a YAML file holds, with changes of the form "key=value" or "key.inner.0=value".

    Args:
        whole: writes out what the file may abbreviate, so that changes find their place in it.

    Raises:
        ValueError: no YAML, no mapping, a change of a place that is not there.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    try:
        values = yaml.load(text, _OnceLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold fields and their values, got {type(values).__name__}")
    values = _unshared(values)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"a change must look like key=value, got {change!r}")
        try:
            values = whole(values)
            _set(values, name.strip().split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {change!r} is not YAML: {error}") from error
    fields: dict[str, Any] = values
    return fields


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from plain values; fields that are missing have their defaults.

    Raises:
        ValueError: an unknown field, one that is missing, a value of another type; names the field.
            Or what the dataclass itself refuses.
    """
    made: T = _build(kind, values, "")
    return made


def _unshared(values: Any) -> Any:
    """A copy in which what an anchor names stands in each of its places."""
    if isinstance(values, dict):
        return {name: _unshared(value) for name, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _set(values: Any, path: list[str], value: Any) -> None:
    *way, last = path
    for i, name in enumerate(way):
        if isinstance(values, list):
            values = values[_index(name, values)]
        else:
            key = _key(name, values)
            if values.get(key) is None:  # missing, or left empty
                values[key] = {}
            values = values[key]
        if not isinstance(values, (dict, list)):
            above = ".".join(path[: i + 1])
            raise ValueError(f"{'.'.join(path)} is no field: {above} is {values!r}")
    if isinstance(values, list):
        values[_index(last, values)] = value
    else:
        values[_key(last, values)] = value


def _key(name: str, values: dict[Any, Any]) -> Any:
    """The key that is written so: YAML takes 4000 for a number."""
    return next((key for key in values if str(key) == name), name)


def _index(name: str, values: list[Any]) -> int:
    if not name.isdecimal() or int(name) >= len(values):
        raise ValueError(f"{name!r} is no place in a list of {len(values)}")
    return int(name)


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value`, as YAML has it, as the type `kind` that a field declares.

    Raises:
        ValueError: it is of another type; names the field.
    """
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast("type", kind), value, path)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        kinds = [one for one in inner if one is not type(None)]
        fitting = [one for one in kinds if _has_shape(one, value)]
        return _build((fitting or kinds)[0], value, path)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{path} must be one of {', '.join(map(str, inner))}, got {value!r}")
        return value
    if origin is tuple:
        return _build_tuple(inner, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must hold fields, got {value!r}")
        return {
            _build_key(inner[0], k, path): _build(inner[1], v, f"{path}.{k}")
            for k, v in value.items()
        }
    return _build_plain(kind, value, path)


def _has_shape(kind: Any, value: Any) -> bool:
    """Whether a value may be meant as this type, of several."""
    origin = get_origin(kind) or kind
    if isinstance(value, Mapping):
        return origin is dict or dataclasses.is_dataclass(kind)
    if isinstance(value, list):
        return origin is tuple
    return isinstance(origin, type) and isinstance(value, origin)


def _build_key(kind: Any, key: Any, path: str) -> Any:
    if kind is str:
        return str(key)
    if kind is int and isinstance(key, str) and key.isdecimal():
        return int(key)  # of a change, whose keys are text
    return _build(kind, key, f"a key of {path}")


def _build_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must hold fields, got {value!r}")
    hints = get_type_hints(kind)
    names = [one.name for one in dataclasses.fields(kind)]
    where = f"{path}." if path else ""
    for name in value:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown field {where}{name}; there are {', '.join(names)}{hint}")
    for one in dataclasses.fields(kind):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in value:
            raise ValueError(f"{where}{one.name} is missing")
    return kind(**{n: _build(hints[n], v, f"{where}{n}") for n, v in value.items()})


def _build_tuple(inner: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{path} must be a list, got {value!r}")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise ValueError(f"{path} must be a list of {len(kinds)}, got {value!r}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_build(kind, one, f"{path}.{i}") for i, (kind, one) in pairs)


def _build_plain(kind: Any, value: Any, path: str) -> Any:
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 3e-4 for text
        except ValueError:
            pass
    raise ValueError(f"{path} must be {kind.__name__}, got {value!r}")
