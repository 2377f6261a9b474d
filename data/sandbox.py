"""Renders untrusted chat templates in jinja2's sandbox, with limited time and memory.

transformers renders templates in jinja2's `ImmutableSandboxedEnvironment`, which limits what a
template can reach, but not how much time and memory it takes: `{{ 'a' * 10**10 }}`. The environment
here is the same, but a template's syntax tree is changed before it is compiled: each pass of a loop
costs as many units as it has nodes, and each value that is made costs its size, so no value
outgrows the budget. What can make a value much larger than its operands is charged first, or
refused. No clock, thread or process is involved: a template that is refused is refused everywhere.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE = 2**16  # characters; published templates have at most 20,000
BUDGET = 2**21  # units for a conversation without text: about a second
PER_CHARACTER = 64  # further units for each character of the conversation
MAX_ARGUMENT = 2**10  # characters given to an operation on texts: `strip` takes their product
MAX_DEPTH = 64  # of values that contain each other
DATE = "\ue000(the date)\ue000"  # of `strftime_now`: a run that trains on a date cannot be repeated

# All that published chat templates use, and more. Each takes time linear in the size of its
# operands. Those by which templates escaped from older sandboxes are not among them: `format`
# (CVE-2024-56326) and the filter `attr` (CVE-2025-27516).
FILTERS = """abs capitalize count d default dictsort e escape first float int items join last length
    list lower map max min reject rejectattr replace reverse safe select selectattr sort string
    title tojson trim unique upper""".split()
TESTS = """!= == boolean defined eq equalto even false float in integer iterable lower mapping ne
    none number odd sameas sequence string true undefined upper""".split()
METHODS = """capitalize count endswith find get index isalnum isalpha isdigit isspace items join
    keys lower lstrip partition removeprefix removesuffix replace rfind rpartition rsplit rstrip
    split splitlines startswith strip title upper values""".split()
REFUSED = (nodes.Block, nodes.CallBlock, nodes.Extends, nodes.FilterBlock, nodes.FromImport,
           nodes.Import, nodes.Include)  # fmt: skip
MAKES_A_VALUE = (nodes.BinExpr, nodes.Call, nodes.Concat, nodes.Dict, nodes.Filter, nodes.List,
                 nodes.Tuple)  # fmt: skip


class Unrenderable(Exception):
    """Why a template cannot be rendered: the rest of a sentence that begins with "it"."""


class Program:
    """A compiled template."""

    def __init__(self, text: str):
        """Raises Unrenderable for a template that is not valid, too long or not allowed."""
        if len(text) > MAX_TEMPLATE:
            raise Unrenderable(f"has more than {MAX_TEMPLATE:,} characters")
        self._sandbox = Sandbox()
        try:
            tree = Meters().visit(self._sandbox.parse(text)).set_environment(self._sandbox)
            self._sandbox.size = _count(tree)
            self._template = self._sandbox.from_string(tree)
        except Exception as error:  # whatever a hostile template provokes in the parser
            raise _reason(error) from None

    def render(self, characters: int, variables: Mapping[str, Any]) -> str:
        """The text for `variables`, whose texts have `characters` characters in total."""
        self._sandbox.meter.left = BUDGET + PER_CHARACTER * characters
        try:
            text = self._template.render(variables)
            text.encode()  # UnicodeEncodeError for half of a character
            return text
        except Exception as error:
            raise _reason(error) from None


def _reason(error: Exception) -> Unrenderable:
    if isinstance(error, Unrenderable):
        return error
    if isinstance(error, TemplateSyntaxError):
        return Unrenderable(f"cannot be compiled: {error.message} (line {error.lineno})")
    if isinstance(error, RecursionError):
        return Unrenderable("is nested too deeply, or calls itself without end")
    return Unrenderable(f"fails: {error or type(error).__name__}")


class Generation(Extension):
    """`{% generation %}` marks what the assistant says; it renders what is inside."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), True), lineno=line)


class Meters(NodeTransformer):
    """Adds calls that charge the budget to a template's tree; raises for a tag of `REFUSED`."""

    def visit(self, node: nodes.Node) -> Any:
        if isinstance(node, REFUSED) or getattr(node, "recursive", False):
            raise Unrenderable(f"uses {type(node).__name__} in line {node.lineno}")
        if isinstance(node, nodes.AssignBlock) and node.filter:
            raise Unrenderable(f"uses a filter on a block in line {node.lineno}")
        cost = _count(node) if isinstance(node, nodes.For) else 0
        node = self.generic_visit(node)
        if isinstance(node, nodes.For):
            node.iter = _filter(node.iter, "meter loop", nodes.Const(cost))
        elif isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data)  # goes through `finalize`, which charges for it
        elif isinstance(node, (nodes.Filter, nodes.Test)):
            node.node = _filter(node.node, "meter")
        elif isinstance(node, (nodes.Compare, nodes.Operand)):
            node.expr = _filter(node.expr, "meter")
        is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        is_value = isinstance(node, MAKES_A_VALUE) and getattr(node, "ctx", "load") == "load"
        return _filter(node, "meter") if is_slice or is_value else node


def _filter(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _count(tree: nodes.Node) -> int:
    return 1 + sum(1 for _ in tree.find_all(nodes.Node))


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with a budget."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    size = 0  # nodes of the template

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols],
            optimized=False, finalize=self._finalize,
        )  # fmt: skip
        self.meter = threading.local()
        self.filters = {name: self.filters[name] for name in FILTERS} | {
            "meter": self._charge, "meter loop": self._loop, "join": self._join,
            "replace": self._replace, "tojson": self._tojson, "trim": self._trim,
        }  # fmt: skip
        self.tests = {name: self.tests[name] for name in TESTS}
        self.globals = {name: self.globals[name] for name in ("range", "namespace")} | {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: DATE,
        }

    def _spend(self, units: int) -> None:
        self.meter.left -= units
        if self.meter.left < 0:
            raise Unrenderable("takes more time or memory than a chat template needs")

    def _charge(self, value: Any, depth: int = 0) -> Any:
        """Charge a value's size, with everything in it, and return it."""
        if type(value) is str:  # most are, and this is called for every node
            self._spend(1 + len(value))
            return value
        if isinstance(value, Iterator):  # of a filter: what it yields later would cost nothing
            value = list(islice(value, self.meter.left + 1))
        parts: Iterable[Any] = ()
        if isinstance(value, Mapping):
            parts = (part for item in value.items() for part in item)
        elif isinstance(value, (list, tuple)):
            parts = value
        if depth > MAX_DEPTH:
            raise Unrenderable("nests values too deeply")
        if isinstance(value, int) and value.bit_length() > 64:
            raise Unrenderable("computes a number of more than 64 bits")
        self._spend(1 + (len(value) if hasattr(value, "__len__") else 0))
        for part in parts:
            self._charge(part, depth + 1)
        return value

    def _loop(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        for value in values:
            self._spend(max(cost, 1))
            yield value

    @pass_context  # without a context, jinja2 would call it while compiling
    def _finalize(self, context: Context, value: Any) -> Any:
        return self._charge(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or operator == "%" and isinstance(left, str):
            raise Unrenderable(f"uses {operator}")  # as in 10 ** 10 ** 10, or '%9999999999d' % 1
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if hasattr(value, "__len__") and isinstance(times, int):
                    self._spend(len(value) * max(times, 0))
        return super().call_binop(context, operator, left, right)

    def call(_self, _context: Any, _function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(_function, "__self__", None)
        if isinstance(owner, (str, list, tuple, dict)) and _function.__name__ in METHODS:
            _self._charge(owner)
            _self._check(*args, *kwargs.values())
            if isinstance(owner, str) and _function.__name__ in ("join", "replace"):
                return getattr(_self, f"_{_function.__name__}_text")(owner, *args)
        elif isinstance(_function, Macro):
            _self._spend(_self.size)  # it has no more nodes than that
        elif not isinstance(owner, LoopContext) and _function not in _self.globals.values():
            name = getattr(_function, "__name__", type(_function).__name__)
            raise Unrenderable(f"calls {name}()")
        return super().call(_context, _function, *args, **kwargs)

    def _check(self, *args: Any) -> None:
        if any(isinstance(arg, str) and len(arg) > MAX_ARGUMENT for arg in args):
            raise Unrenderable(f"passes more than {MAX_ARGUMENT:,} characters to a method")

    def _join_text(self, separator: str, values: Iterable[Any]) -> str:
        texts = self._charge(list(islice(values, self.meter.left + 1)))
        self._spend(len(texts) * len(separator))
        return separator.join(texts)

    def _replace_text(self, text: str, old: str, new: str, count: int = -1) -> str:
        self._check(old, new)
        self._spend(text.count(old) * len(new))
        return text.replace(old, new, count)

    # Filters. `join` and `replace` are jinja2's; `tojson` is transformers', without HTML's escapes.

    def _join(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        return self._join_text(str(d), map(str, value))

    def _replace(self, s: Any, old: str, new: str, count: int | None = None) -> str:
        return self._replace_text(str(s), str(old), str(new), -1 if count is None else count)

    def _trim(self, value: Any, chars: str | None = None) -> str:
        self._check(chars)
        return str(value).strip(chars)

    def _tojson(self, x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        self._charge(x)
        spaces = indent if isinstance(indent, int) else len(indent or "")
        if spaces > 16 or sum(map(len, separators or ())) > 16:
            raise Unrenderable("writes JSON with more than 16 spaces or separators")
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
