"""The template sandbox: what Hugging Face templates need works, and nothing runs away."""

import re
import time
import tracemalloc

import pytest

from mlx_mtp import meter
from mlx_mtp.chat_template import MAX_TEMPLATE_CHARS, render
from mlx_mtp.errors import PromptError


def rendered(source: str, **variables: object) -> str:
    return render(source, variables, input_chars=100)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),  # trim_blocks and lstrip_blocks
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "01"),
        ("{{ {'k': '<é>', 'n': [1, none, true]} | tojson }}", '{"k": "<é>", "n": [1, null, true]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% generation %}{{ 'a' ~ 1 ~ none }}{% endgeneration %}", "a1None"),
        (
            "{% set n = namespace(s='') %}{% for x in 'abc' %}{% set n.s = n.s + x %}{% endfor %}{{ n.s }}",
            "abc",
        ),
        ("{% macro m(a, b='y') %}<{{ a }}{{ b }}>{% endmacro %}{{ m('x') | trim }}", "<xy>"),
        ("{% set t %} a {% endset %}[{{ t | trim }}]", "[a]"),
        ("{{ 'a-b-c'.split('-') | join('+') }}{{ '+'.join(['a', 'b']) }}", "a+b+ca+b"),
        ("{{ 'aXa'.replace('X', 'yy') }}{{ 'aXa' | replace('a', '') }}", "ayyaX"),
        ("{{ '  x y ' | trim }}{{ 'xxaxx'.strip('x') }}{{ 'ab'.upper() }}", "x yaAB"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
        ("{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "b1a2"),
        ("{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | list }}", "[1, 2]"),
        ("{{ [{'a': 1}, {}] | selectattr('a', 'defined') | list | length }}", "1"),
        ("{{ 'a\nb' | indent(2) }}|{{ missing }}|{{ missing | default('d') }}", "a\n  b||d"),
        ("{{ [1, 2, 3][1:] }}{{ 'abc'[::-1] }}{{ (1, 'x') }}{{ 2 * 3 ** 2 % 5 }}", "[2, 3]cba(1, 'x')3"),
        ("{{ 'ab' * 2 }}{{ [0] * 2 }}{{ 1.5 | round }}{{ 7 // 2 }}", "abab[0, 0]2.03"),
    ],
)
def test_what_templates_use(source: str, text: str) -> None:
    assert rendered(source) == text


def test_strftime_now_gives_this_year() -> None:
    assert rendered("{{ strftime_now('%Y') }}") == time.strftime("%Y")


DOUBLING = "{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ n.x }}}}"


def doubling(step: str, start: str = "'a'") -> str:
    return DOUBLING.format(step=step, start=start)


def compared(pair: str) -> str:
    """Two equal values of 2^60 parts, each made of 60 objects."""
    step = f"{{% set n.x = {pair.format('n.x')} %}}{{% set n.y = {pair.format('n.y')} %}}"
    return f"{{% set n = namespace(x=1, y=1) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ n.x == n.y }}}}"


BOMBS = {
    "product": "{{ 'a' * 10**9 }}",
    "product the other way": "{{ 10**9 * 'a' }}",
    "list product": "{{ [0] * 10**9 }}",
    "product of a product": "{{ [['a' * 10**6] * 10**4] * 10**4 }}",
    "repeated big parts": "{{ ['a' * 10**6] * 10**4 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": doubling("{% set n.x = n.x * n.x %}", "9"),
    "sum": doubling("{% set n.x = n.x + n.x %}"),
    "list sum": doubling("{% set n.x = n.x + n.x %}", "[0]"),
    "tilde": doubling("{% set n.x = n.x ~ n.x %}"),
    "captured block": doubling("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "join": doubling("{% set n.x = [n.x, n.x] | join %}"),
    "join method": doubling("{% set n.x = ''.join([n.x, n.x]) %}"),
    "replace": doubling("{% set n.x = n.x | replace('a', 'aa') %}"),
    "replace method": doubling("{% set n.x = n.x.replace('a', 'aa') %}"),
    "nested lists": doubling("{% set n.x = [n.x, n.x] %}"),
    "nested lists compared": compared("[{0}, {0}]"),
    "nested dict calls compared": compared("dict(a={0}, b={0})"),
    "nested dicts": doubling("{% set n.x = {'a': n.x, 'b': n.x} %}"),
    "nested dict calls": doubling("{% set n.x = dict(a=n.x, b=n.x) %}"),
    "nested tuples as keys": doubling("{% set n.x = (n.x, n.x) %}{% set y = {n.x: 1} %}"),
    "namespaces printed": doubling("{% set n.x = namespace(a=n.x, b=n.x) %}") + "{{ n.x | upper }}",
    "long separator": "{{ ([''] * 10**5) | join('a' * 10**5) }}",
    "long separator by method": "{{ ('a' * 10**5).join([''] * 10**5) }}",
    "long replacement": "{{ big | replace('b', 'a' * 10**5) }}",
    "long replacement by method": "{{ big.replace('b', 'a' * 10**5) }}",
    "sorted range": "{% set r = range(10**7) %}{{ [r | sort, r | sort, r | sort] | length }}",
    "search of a range": "{{ 1.5 in range(10**12) }}",
    "json layout": "{{ many | tojson(indent=256) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "mapped copies": "{% set s = 'a' * 10**6 %}{{ ([s] * 15) | map('upper') | map('lower') | list }}",
    "format method": "{{ '{:>999999999}'.format('a') }}",
    "percent format": "{{ '%999999999d' % 1 }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "range": "{{ range(10**9) | list }}",
    "long output": "{% for i in range(10**5) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "long constant output": "{% for i in range(10**5) %}" + "a" * 100 + "{% endfor %}",
    "captured constant": "{% set x %}{% for i in range(10**4) %}" + "a" * 10**5 + "{% endfor %}{% endset %}",
    "loops that print nothing": "{% set r = range(10**4) %}"
    + "{% for a in r %}" * 4
    + "{% set x = a %}"
    + "{% endfor %}" * 4,
    "macro recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "deep recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "strip": "{% set s = 'a' * 10**6 %}{{ s.strip('b' * 10**5 + 'a') }}",
    "trim": "{% set s = 'a' * 10**6 %}{{ s | trim('b' * 10**5 + 'a') }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "date format": "{{ strftime_now('%c' * 10**6) }}",
    "slices kept": doubling("{% set n.x = n.x + [big[:]] %}", "[]").replace("range(60)", "range(10**6)"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_in_bounded_time_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 42. The limit on time is lowered; tracing memory makes everything some times slower than it is."""
    monkeypatch.setattr(meter, "TIME_LIMIT_S", 0.3)
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(PromptError, match=r"the chat template (is stopped|failed \((?!MemoryError))"):
            rendered(BOMBS[name], big="b" * 10**6, many=[[[0] * 10**6]])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 4
    assert peak < 600e6


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ [].__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__self__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ('' | attr('__class__')) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ['__class__'] | map(attribute='__class__.__mro__') | list | tojson }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends 'x' %}",
        "{{ self.__init__ }}{{ loop.x }}{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_escapes_are_refused_or_give_nothing(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    try:
        text = rendered(source, messages=messages)
    except PromptError as error:
        assert error.exit_code == 2
    else:
        assert text in ("", "[null]", '[""]')
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate;"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ none.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'x' | nosuchfilter }}", "nosuchfilter"),
        ("{{ namespace }}", "prints a type"),
        (
            "{% for i in range(20) %}" + "a" * 10**5 + "{% endfor %}",
            "its text has more than 1,048,976 characters",
        ),
        ("(" * 5000 + "{{" + "(" * 5000, "failed"),
        ("{{ " + "[" * 5000 + "]" * 5000 + " }}", "failed"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), f"at most {MAX_TEMPLATE_CHARS:,} characters"),
    ],
)
def test_broken_templates_are_refused(source: str, says: str) -> None:
    """Fault 41: one line, with the reason and a remedy."""
    with pytest.raises(PromptError, match=re.escape(says)) as caught:
        rendered(source)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    "part", ["{", "{{", "{% if a %}", "{#", "{{ a[", "{{ -", "'", "{{ a.b|c ", "{%- for a in b -%}"]
)
def test_compiling_is_bounded(part: str) -> None:
    source = part * ((MAX_TEMPLATE_CHARS - 10) // len(part))
    began = time.thread_time()
    try:
        rendered(source)
    except PromptError:
        pass
    assert time.thread_time() - began < 5


def test_long_conversations_stay_far_from_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 messages, each split, joined, and compared with all before it, as in Gemma's own template."""
    charged = []
    charge = meter.Meter.charge
    monkeypatch.setattr(meter.Meter, "charge", lambda self, n: (charged.append(n), charge(self, n))[1])
    source = (
        "{% macro kept(text) %}{% set n = namespace(s='') %}{% for p in text.split('|') %}"
        "{% set n.s = n.s + p %}{% endfor %}{{ n.s | trim }}{% endmacro %}"
        "{% for m in messages %}{% set body %}{{ kept(m['content']) }}{% endset %}"
        "{% for j in range(loop.index0 - 1, -1, -1) %}{% if messages[j]['role'] == 'tool' %}!{% endif %}{% endfor %}"
        "{{ m['role'] ~ '\n' ~ body ~ (messages[loop.index0:] | length) }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "ab cd efg|" * 10} for _ in range(500)]
    text = render(source, {"messages": messages}, input_chars=50_000)
    assert text.count("ab cd efg") == 500 * 10
    assert sum(charged) < meter.Meter(50_000).left / 4


def test_more_time_for_longer_conversations() -> None:
    assert meter.Meter(0).seconds == meter.TIME_LIMIT_S
    assert meter.Meter(100_000).seconds == meter.TIME_LIMIT_S + 10
    assert meter.Meter(10**9).seconds == meter.TIME_LIMIT_S + meter.EXTRA_TIME_S
