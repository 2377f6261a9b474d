"""One dataclass is the command line, the saved configuration, and what the code reads.

Each field is an option: `learning_rate: float = option(2e-4, "peak learning rate", above=0)`
becomes `--learning-rate 2e-4` and a key of `config.json`.
"""

import argparse
import dataclasses
import difflib
import math
import re
import shlex
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from errors import BadOption, listed
from files import read_json, user_path
from run import elsewhere
from run.identity import program
from typed import fits

T = TypeVar("T")
METAVARS = {str: "TEXT", int: "N", float: "X", "any": "NAME", "new": "PATH", "file": "FILE"}
FLAG = re.compile(r"--?[A-Za-z]")  # not a negative number
NOTHING: Mapping[str, Any] = MappingProxyType({})


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    path: str | None = None,
) -> Any:
    """A dataclass field with a help text and the values it may take.

    `path` is for the name of a file or folder: what it must be, as for `files.user_path`.
    """
    limits = {"choices": choices, "least": least, "above": above, "below": below, "path": path}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def command(script: str = "") -> str:
    """How to start this program again, or another `script`, as this one was started.

    `python train.py`, `.venv/bin/python train.py`, `python -m report`, or for an installed package
    `plain-lora train`, which cli.py has set.
    """
    own, python = sys.argv[0], shlex.quote(sys.orig_argv[0])
    if " " in own and not own.endswith(".py"):
        return f"{own.rpartition(' ')[0]} {script}" if script else own
    spec = sys.modules["__main__"].__spec__
    if spec and not script:
        return f"{python} -m {spec.name.removesuffix('.__main__')}"
    path = Path(own).with_name(f"{script}.py") if script else Path(own)
    return f"{python} {shlex.quote(str(path))}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadOption(message, f"{self.prog} --help lists the options")


def parse(
    cls: type[T],
    argv: Sequence[str] | None,
    description: str,
    *,
    presets: Mapping[str, dict[str, Any]] = NOTHING,
    groups: Mapping[str, tuple[str, str]] = NOTHING,
    renamed: Mapping[str, str] = NOTHING,
) -> T:
    """`cls` from the command line; BadOption lists every invalid value.

    Args:
        description: of the script; what follows its first line stands after the options in --help.
        presets: flag -> values of other options, which those given explicitly override.
        groups: title -> (name of the first field of that group in --help, options as an example),
            in the fields' order.
        renamed: former name of an option -> its name now.
    """
    argv = [str(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    first_line, _, rest = description.partition("\n")
    parser = _Parser(
        prog=command(), usage="%(prog)s [options]", description=first_line, epilog=rest,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    types = typing.get_type_hints(cls)
    starts = {first: (title, f"%(prog)s {example}") for title, (first, example) in groups.items()}
    group = parser
    for field in dataclasses.fields(cls):
        if field.name in starts:
            group = parser.add_argument_group(*starts[field.name])
        group.add_argument(_flag(field.name), **_argument(field, types[field.name]))
    parser.add_argument(
        "--debug", action="store_true", help="show where in the code an error came from"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="JSON file of options, such as a run's config.json"
    )
    parser.add_argument("--version", action="version", version=version())
    argv = with_known_flags(argv, known_flags(cls, presets), renamed, parser.prog)
    for name, values in presets.items():
        flags = " ".join(f"{_flag(k)} {shown(v)}" for k, v in values.items())
        parser.add_argument(_flag(name), action="store_true", help=f"short for {flags}")
        if _flag(name) in argv:
            parser.set_defaults(**values)
    if path := _config_file(argv):
        parser.set_defaults(**read_options(cls, path))  # flags override them
    given = vars(parser.parse_args(argv))
    names = {field.name for field in dataclasses.fields(cls)}
    config = _with_paths(cls(**{name: given[name] for name in given if name in names}))
    if problems := value_problems(config):
        raise BadOption(listed(problems), f"{parser.prog} --help lists the options")
    return config


def _with_paths(config: T) -> T:
    """`config` with its paths expanded; BadOption for one that is not what it should be."""
    found = {}
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.metadata["path"]
        if kind and isinstance(value, tuple):
            found[field.name] = tuple(user_path(_flag(field.name), text, kind) for text in value)
        elif kind and value:
            found[field.name] = user_path(_flag(field.name), value, kind)
    return dataclasses.replace(config, **found)


def version() -> str:
    """The program's name, its version if it is installed, and git's description of a clone."""
    facts = program()
    return " ".join(filter(None, ("plain-lora", facts["program_version"], facts["program_git"])))


def _config_file(argv: Sequence[str]) -> Path | None:
    parser = _Parser(prog=command(), add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(argv)[0].config
    return Path(user_path("--config", path, "file")) if path else None


def read_options(cls: type, path: Path) -> dict[str, Any]:
    """The options in a JSON file: an object of them, or a run's `config.json`.

    Raises BadOption, listing every key that is not an option and every value of a wrong type.
    """
    values = read_json(path, BadOption, "give a JSON file of options, such as a config.json")
    values = values["options"] if isinstance(values.get("options"), dict) else values
    types = typing.get_type_hints(cls)
    options = {name.replace("-", "_"): value for name, value in values.items()}
    problems = []
    for name, value in options.items():
        if name not in types:
            advice = _advice(_flag(name), known_flags(cls), {})
            problems.append(f"there is no option {name}" + f" ({advice})" * bool(advice))
        elif not fits(value, types[name]):
            problems.append(f"{name} is {value!r}")
    for field in dataclasses.fields(cls):
        choices, value = field.metadata["choices"], options.get(field.name, field.default)
        if choices and value not in (*choices, field.default):
            problems.append(f"{field.name} is {value!r}, not {' or '.join(choices)}")
    if problems:
        raise BadOption(f"--config {path}: {listed(problems)}", "correct the file")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def known_flags(cls: type, presets: Iterable[str] = ()) -> list[str]:
    """Every flag of an options dataclass: those of its fields and presets, and the general ones."""
    fields = dataclasses.fields(cls)
    types = typing.get_type_hints(cls)
    switches = [field.name for field in fields if _is_switch(types[field.name])]
    names = [field.name for field in fields] + [f"no-{name}" for name in switches]
    return [_flag(name) for name in (*names, *presets, "config", "version", "debug", "help")]


def with_known_flags(
    argv: Sequence[str], known: Sequence[str], renamed: Mapping[str, str], prog: str
) -> list[str]:
    """`argv` with underscores in flags as hyphens; BadOption lists all flags that do not exist.

    Each comes with what it is called here, if it is another trainer's option, or with the flag that
    is spelled most like it. `renamed` maps former names to today's.
    """
    result, unknown = [], {}
    for index, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        hyphened = flag.replace("_", "-")
        if arg == "--":  # ends the options
            return [*result, *argv[index:]]
        if hyphened in known:
            arg = hyphened + equals + value
        elif FLAG.match(arg) and " " not in arg and flag != "-h":
            unknown[flag] = _advice(flag, known, renamed)
        result.append(arg)
    if unknown:
        several, to_help = len(unknown) > 1, not all(unknown.values())
        advice = [f"{flag}: {text}" if several else text for flag, text in unknown.items() if text]
        if to_help or any(text.startswith("did you") for text in unknown.values()):
            advice.append(f"{prog} --help lists the options")
        raise BadOption(f"there is no option {', '.join(unknown)}", "; ".join(advice))
    return result


def _advice(flag: str, known: Sequence[str], renamed: Mapping[str, str]) -> str:
    """What to type instead of a flag that does not exist; "" if nothing is known about it."""
    name = flag.lstrip("-").replace("-", "_").casefold()
    here = [renamed[name]] if name in renamed else []
    here += [ours for ours, names in elsewhere.NAMES.items() if name in names]
    for ours in here:
        if _flag(ours) in known:
            return f"use {_flag(ours)}"
    for advice, names in elsewhere.ADVICE.items():
        if name in names:
            return advice
    close = difflib.get_close_matches(_flag(name), known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else ""


class _Names(argparse.Action):
    """`A,B`, `A B` and the option given twice are the same two names."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = vars(namespace).setdefault("given_lists", {})
        names = given.setdefault(self.dest, [])
        names += [name for text in values for name in text.split(",")]
        setattr(namespace, self.dest, tuple(names))


def _is_switch(kind: Any) -> bool:
    """Whether an option of the type `kind` is given as --name or --no-name."""
    return kind in (bool, bool | None)


def _argument(field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    note = "" if default in (None, "", False) else f" (default: {default})".replace("%", "%%")
    argument = {"help": field.metadata["help"] + note, "default": field.default}
    if _is_switch(kind):
        return argument | {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        return argument | {"action": _Names, "nargs": "+", "metavar": "NAME"}
    if typing.get_args(kind):  # X | None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    choices = field.metadata["choices"]
    metavar = "|".join(choices) if choices else METAVARS[field.metadata["path"] or kind]
    return argument | {"type": kind, "choices": choices, "metavar": metavar}


def value_problems(config: Any) -> list[str]:
    """What is wrong with the values of an options dataclass."""
    problems = []
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        name = _flag(field.name)
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


def changed_options(config: Any) -> dict[str, Any]:
    """The options that differ from their defaults, as JSON values by name."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {k: v for k, v in to_json(config).items() if getattr(config, k) != defaults[k]}


def in_two_columns(values: Mapping[str, Any]) -> str:
    """Names and values for people, two per line of 80 columns where they fit."""
    cells = [f"{name} {shown(value)}" for name, value in values.items()]
    lines = []
    while cells:
        first = cells.pop(0)
        if len(first) < 38 and cells and len(cells[0]) < 40:
            first = f"{first:<39}{cells.pop(0)}"
        lines.append("  " + first)
    return "\n".join(lines)


def shown(value: Any) -> str:
    """An option's value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
