"""Frozen dataclasses from JSON, with every missing, foreign or mistyped field named."""

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Builds a value of a type from what `json.loads` gave.

    Args:
        kind: A dataclass, or a type made of str, int, float, bool, dict, tuple[X, ...], Any and `| None`.
        value: From JSON.
        where: Names the value in errors.

    Returns:
        The value.

    Raises:
        TypeError: Anything in it has another type or name; says where.
    """
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        known, required = _field_types(kind)
        if not isinstance(value, dict) or not required <= value.keys() <= known.keys():
            raise TypeError(f"{where} does not have exactly the fields {', '.join(sorted(known))}")
        return kind(**{name: from_json(known[name], item, f"{where}.{name}") for name, item in value.items()})
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {name: from_json(parameters[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(from_json(parameters[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is types.UnionType:
        if value is None:
            return None
        (kind,) = (one for one in parameters if one is not type(None))
        return from_json(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise TypeError(f"{where} is {value!r:.60}, not of the type {getattr(kind, '__name__', kind)}")


@lru_cache
def _field_types(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The type of each field, and those without a default; others may be missing in files of older versions."""
    hints, found = typing.get_type_hints(kind), fields(kind)
    required = (field.name for field in found if field.default is MISSING and field.default_factory is MISSING)
    return {field.name: hints[field.name] for field in found}, frozenset(required)
