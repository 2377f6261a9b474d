"""JSON values checked against declared types: a file may be edited, or of a newer version."""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar

T = TypeVar("T")
LARGEST = 2**63  # whole numbers that other programs can read are smaller
TEXT = {str: "a text", int: "a whole number", float: "a number", bool: "true or false",
        list: "a list", dict: "an object"}  # fmt: skip


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the type `kind`: one of `TEXT`, X | None, list[X], dict[str, X],
    tuple[X, ...], or Any.

    A number is finite, and a whole one is below 2**63. Whole numbers are numbers; booleans are not.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < LARGEST
    return isinstance(value, kind) and (kind is not float or math.isfinite(value))


def fault(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> str | None:
    """What is wrong with the first of `values` that is not of its kind; None if all are.

    Keys without a value are not looked at.
    """
    for name, kind in kinds.items():
        if name in values and not fits(values[name], kind):
            return f"{name} is {values[name]!r:.60}, not {TEXT.get(kind, kind)}"
    return None


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def record(cls: type[T], values: Any) -> T:
    """The dataclass `cls` made of a JSON object; ValueError says which key it is that does not fit.

    A key without a default must be there, and one that `cls` does not have is of a newer version.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is {values!r:.60}, not an object")
    kinds = _kinds(cls)
    needed = [f.name for f in dataclasses.fields(cls)
              if f.default is f.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{missing[0]} is missing")
    if unknown := [name for name in values if name not in kinds]:
        raise ValueError(f"{unknown[0]} is not known to this version")
    if wrong := fault(values, kinds):
        raise ValueError(wrong)
    return cls(**values)
