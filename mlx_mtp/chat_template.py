"""A checkpoint's chat template, run as what it is: a program by a stranger, within fixed limits.

The sandbox is Jinja's immutable one, cut down to the filters and methods that chat templates use.
Whatever makes text or lists is charged to a meter before it happens, and every loop and macro body ticks,
so that a template ends within bounds of processor time and memory that follow from the size of its input.
No thread, signal or subprocess is needed, and the host's limits stay as they are.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinMethodType, CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_mtp.errors import PromptError
from mlx_mtp.meter import VALUE_COST, LimitExceeded, Meter, check_integers, check_small

MAX_TEMPLATE_CHARS = 1 << 17  # Gemma 4's have 18,000
_PLAIN_FILTERS = """
    abs count d default dictsort first float int items last length map max min reject rejectattr reverse
    select selectattr sort unique
""".split()
_TEXT_FILTERS = "capitalize lower title trim upper".split()
_STR_METHODS = frozenset(
    """
    capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper join lower
    lstrip removeprefix removesuffix replace rfind rindex rsplit rstrip split splitlines startswith strip
    title upper
    """.split()
)
_TICK, _TILDE, _LITERAL = " tick", " tilde", " literal"  # names that no template can write
_CONTAINER_METHODS = frozenset("copy count get index items keys values".split())


class ChatSandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering; `meter` is its own."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, meter: Meter) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", GenerationBlock],
            finalize=_finalize,
        )
        self.meter = meter
        self.filters = {name: _charged(meter, FILTERS[name]) for name in _PLAIN_FILTERS}
        self.filters |= {name: self._text_filter(FILTERS[name]) for name in _TEXT_FILTERS}
        self.filters |= {
            "indent": self.indent,
            "join": self.join,
            "list": self.listed,
            "replace": self.replace,
            "round": self.round,
            "safe": self.text,
            "string": self.text,
            "tojson": self.tojson,
            _LITERAL: self.literal,
            _TICK: meter.charge,
            _TILDE: self.tilde,
        }
        self.globals = {
            "dict": dict,
            "namespace": jinja2.utils.Namespace,
            "raise_exception": _raise_exception,
            "range": self.range,
            "strftime_now": _strftime_now,
        }

    def text(self, value: Any) -> str:
        """-> str(value), for the plain values whose text has a known size."""
        if isinstance(value, str):
            self.meter.charge(len(value))
            return value
        if not isinstance(value, int | float | list | tuple | dict | jinja2.Undefined | None):
            raise LimitExceeded(f"it prints a {type(value).__name__}")
        self.meter.charge_value(value)
        return str(value)

    def tilde(self, parts: Iterable[Any]) -> str:
        """What `~` does."""
        return "".join([self.text(part) for part in parts])

    def literal(self, value: Any) -> Any:
        """A list, tuple or dict that the template wrote."""
        self.meter.charge_value(value)
        return value

    def range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.meter.charge(len(numbers))
        return numbers

    def listed(self, value: Iterable[Any]) -> list[Any]:
        items = []
        for item in value:
            self.meter.charge_value(item)
            items.append(item)
        return items

    def join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = [self.getitem(item, attribute) for item in value]
        parts = [self.text(item) for item in value]
        self.meter.charge(len(d) * len(parts))
        return d.join(parts)

    def replace(self, s: Any, old: str, new: str, count: int = -1) -> str:
        text = self.text(s)
        self.meter.charge(text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        columns = width if isinstance(width, int) else len(width)
        check_small(columns)
        self.meter.charge(len(s) + columns * (s.count("\n") + 1))
        return str(FILTERS["indent"](s, width, first, blank))

    def round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        check_small(precision)
        return float(FILTERS["round"](value, precision, method))

    def tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
    ) -> str:
        """As Hugging Face templates expect it: plain JSON, not escaped for HTML."""
        check_small(indent or 0)
        parts = []
        for part in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options).iterencode(value):
            self.meter.charge(len(part) + 1)
            parts.append(part)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise LimitExceeded("it formats text with %")
        if isinstance(left, int) and isinstance(right, int):
            check_integers(operator, left, right)
        elif operator == "*":
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(sequence, str | list | tuple):
                self.meter.charge(max(times, 0) * len(sequence))
                self.meter.charge_value(sequence * times)
        elif operator == "+":
            self.meter.charge_value(left)
            self.meter.charge_value(right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, BuiltinMethodType) and isinstance(function.__self__, str):
            owner, name = function.__self__, function.__name__
            if name in ("join", "replace"):
                return self.join(args[0], owner) if name == "join" else self.replace(owner, *args)
            self.meter.charge(len(owner))
            if name.endswith("strip") and args and args[0] is not None:
                check_small(len(args[0]))
        self.meter.charge(VALUE_COST)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, list | tuple | dict):
            self.meter.charge_value(result)
        return result

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would let str.format through here, which pads to any width."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice) and isinstance(obj, str | list | tuple):
            self.meter.charge(len(obj))
        return super().getitem(obj, argument)

    def _text_filter(self, function: Callable[..., str]) -> Callable[..., str]:
        def filtered(value: Any, chars: str | None = None) -> str:
            if chars is None:
                return str(function(self.text(value)))
            check_small(len(chars))
            return str(function(self.text(value), chars))

        return filtered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, list | tuple | dict):
            return attr in _CONTAINER_METHODS
        return not isinstance(obj, int | float | range) and super().is_safe_attribute(obj, attr, value)


class GenerationBlock(Extension):
    """{% generation %}: marks a reply for training; here only its content matters."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def render(source: str, variables: Mapping[str, Any], *, input_chars: int) -> str:
    """-> the text that template `source` makes of `variables`, which hold `input_chars` characters.

    Raises PromptError where the template is broken, refuses the messages or exceeds a limit.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise PromptError(
            f"a chat template has at most {MAX_TEMPLATE_CHARS:,} characters, got {len(source):,}; "
            "use the template published with the model"
        )
    most = 4 * input_chars + (1 << 20)
    try:
        sandbox = ChatSandbox(Meter(input_chars))
        template = sandbox.template_class.from_code(sandbox, _compiled(source), sandbox.globals)
        parts, length = [], 0
        for part in template.generate(**variables):
            length += len(part)
            if length > most:
                raise LimitExceeded(f"its text has more than {most:,} characters")
            parts.append(part)
    except Refusal as error:
        raise PromptError(
            f"the chat template refuses these messages: {error}; change the messages"
        ) from error
    except LimitExceeded as error:
        raise PromptError(
            f"the chat template is stopped because {error}; "
            "shorten the conversation, or use the template published with the model"
        ) from error
    except Exception as error:  # a foreign program can fail in any way
        raise PromptError(
            f"the chat template failed ({type(error).__name__}: {str(error)[:200]}); "
            "check the messages, or use the template published with the model"
        ) from error
    return "".join(parts)


class Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> CodeType:
    """-> the template's code with the meter's calls put in."""
    sandbox = ChatSandbox(Meter(len(source)))
    tree = sandbox.parse(source)
    _put_meter_in(tree)
    return sandbox.compile(tree)


def _put_meter_in(tree: nodes.Node) -> None:
    """Make loops and macros tick, and put `~` and literals through filters: nothing else would see them."""
    for node in list(tree.iter_child_nodes()):
        _put_meter_in(node)
    for field, value in list(tree.iter_fields()):
        if isinstance(value, list):
            setattr(tree, field, [_metered(item) for item in value])
        else:
            setattr(tree, field, _metered(value))
    if isinstance(tree, nodes.For | nodes.Macro | nodes.CallBlock):
        constant = sum(len(data.data) for data in tree.find_all(nodes.TemplateData))
        tree.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(constant + 1), _TICK)))


def _metered(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.Tuple(node.nodes, "load"), _TILDE)
    loads = not isinstance(node, nodes.Tuple) or node.ctx == "load"
    if isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and loads:
        return _filtered(node, _LITERAL)
    return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _charged(meter: Meter, function: Callable[..., Any]) -> Callable[..., Any]:
    """-> a filter that charges for its input, whose order of magnitude its result does not exceed."""

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if isinstance(arg, str | list | tuple | range):
                meter.charge(len(arg) * (VALUE_COST if isinstance(arg, range) else 1))
        return function(*args, **kwargs)

    return charged


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> str:
    """What {{ }} prints; taking the context keeps Jinja from evaluating constants while it compiles."""
    return str(context.environment.text(value))


def _raise_exception(message: str) -> None:
    raise Refusal(str(message)[:300])


def _strftime_now(form: str) -> str:
    check_small(len(form))
    return datetime.datetime.now().strftime(form)
