"""One dataclass is the command line, the saved configuration, and what the code reads.

Each field is an option: `learning_rate: float = option(2e-4, "peak of the schedule", above=0)`
becomes `--learning-rate 2e-4` and a key of `config.json`.
"""

import argparse
import dataclasses
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from errors import BadOption, listed

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a help text and the values it may take."""
    limits = {"choices": choices, "least": least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadOption(message, f"python {self.prog} --help lists the options")


def parse(
    cls: type[T],
    argv: Sequence[str] | None,
    description: str,
    presets: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> T:
    """`cls` from the command line; BadOption lists every value that cannot be.

    A preset is a flag that stands for the values of others, which still count if they are given.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        parser.add_argument(
            "--" + field.name.replace("_", "-"), **_argument(field, types[field.name])
        )
    parser.add_argument(
        "--debug", action="store_true", help="show where in the code an error came from"
    )
    argv = sys.argv[1:] if argv is None else argv
    for name, values in presets.items():
        flags = " ".join(f"--{k.replace('_', '-')} {_shown(v)}" for k, v in values.items())
        parser.add_argument("--" + name, action="store_true", help=f"stands for {flags}")
        if "--" + name in argv:
            parser.set_defaults(**values)
            print(f"--{name} stands for {flags}")
    given = vars(parser.parse_args(argv))
    names = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in given.items() if name in names})
    if problems := value_problems(config):
        raise BadOption(listed(problems), f"python {parser.prog} --help lists the options")
    return config


class _Names(argparse.Action):
    """`A,B` and `A B` are the same two names."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(name for text in values for name in text.split(",")))


def _argument(field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    note = "" if default in (None, "") else f" (default: {default})".replace("%", "%%")
    shown = {"help": field.metadata["help"] + note, "default": field.default}
    if kind is bool:
        return shown | {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        return shown | {"action": _Names, "nargs": "+", "metavar": "NAME"}
    if typing.get_args(kind):  # X | None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    choices = field.metadata["choices"]
    metavar = "|".join(choices) if choices else kind.__name__.upper()
    return shown | {"type": kind, "choices": choices, "metavar": metavar}


def value_problems(config: Any) -> list[str]:
    """What is wrong with the values of an options dataclass."""
    problems = []
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} {value} is not a finite number")
        elif limits["least"] is not None and value < limits["least"]:
            problems.append(f"{name} {value} is less than {limits['least']}")
        elif limits["above"] is not None and value <= limits["above"]:
            problems.append(f"{name} {value} is not above {limits['above']}")
        elif limits["below"] is not None and value >= limits["below"]:
            problems.append(f"{name} {value} is not below {limits['below']}")
    return problems


def to_json(config: Any) -> dict[str, Any]:
    """The options as JSON values, by name."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """The reverse of `to_json`."""
    types = typing.get_type_hints(cls)
    is_tuple = {name for name, kind in types.items() if typing.get_origin(kind) is tuple}
    return cls(**{k: tuple(v) if k in is_tuple else v for k, v in values.items()})


def table(values: dict[str, Any]) -> str:
    """Names and values in columns of 38, two abreast: for people, in 80 columns."""
    cells = [f"{name} {_shown(value)}" for name, value in values.items()]
    rows, cells_left = [], list(cells)
    while cells_left:
        first = cells_left.pop(0)
        if len(first) < 38 and cells_left and len(cells_left[0]) < 40:
            first = f"{first:<39}{cells_left.pop(0)}"
        rows.append("  " + first)
    return "\n".join(rows)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
