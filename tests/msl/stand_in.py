"""What takes the place of `mx.fast.metal_kernel`, and keeps the record of what was launched."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .accumulators import accumulators
from .arguments import INPUT, Block, Input, as_mlx, dtype_name, output_block, read_input
from .build import Library, build
from .counters import Counts
from .launch import Launch, Settings, launch
from .lint import lint
from .lower import lower
from .signature import KernelText, Signature, signature


class Runner:
    """Settings for the launches to come, and a record of those that were."""

    def __init__(self, **settings: Any):
        self.current = Settings(**settings)
        self.reset()

    def settings(self, **given: Any) -> None:
        """`order`, `seed`, `check`, `count`, `workers`; what is not given stays."""
        self.current = self.current.changed(**given)

    @contextmanager
    def run(self, **given: Any) -> Iterator["Runner"]:
        """`settings` for one block."""
        before = self.current
        self.settings(**given)
        try:
            yield self
        finally:
            self.current = before

    def reset(self) -> None:
        self.launches: list[Launch] = []
        self.counts: dict[str, Counts] = {}
        self.launched: dict[str, dict[Signature, KernelText]] = {}

    def note(self, kernel: KernelText, source: Signature, done: Launch) -> None:
        self.launches.append(done)
        self.counts.setdefault(kernel.name, Counts()).add(done.counts)
        self.launched.setdefault(kernel.name, {})[source] = kernel

    def source(self, kernel: str) -> str:
        """The text of the last new variant of `kernel` that was launched, as MLX generates it."""
        return list(self.launched[kernel])[-1].text

    def accumulators(self, kernel: str) -> int:
        """Of the largest variant launched; `accumulators.py` says what counts."""
        return max(accumulators(source) for source in self.launched[kernel])

    def lint(self, kernel: str) -> list[str]:
        found = [line for source, text in self.launched[kernel].items() for line in lint(text, source)]
        return list(dict.fromkeys(found))


class StandIn:
    """Called like the kernel that `mx.fast.metal_kernel` returns, and with the settings' names as well."""

    def __init__(self, runner: Callable[[], Runner], text: KernelText, row_contiguous: bool):
        self.runner = runner
        self.text = text
        self.row_contiguous = row_contiguous
        self.built: dict[object, tuple[Signature, Library]] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[object],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[object],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, object]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
        **settings: Any,
    ) -> list[mx.array]:
        text, runner = self.text, self.runner()
        chosen = runner.current.changed(**settings)
        expect("inputs", text.inputs, inputs)
        expect("output_shapes", text.outputs, output_shapes)
        expect("output_dtypes", text.outputs, output_dtypes)
        mx.eval([x for x in inputs if isinstance(x, mx.array)])
        given = [read_input(x, self.row_contiguous) for x in inputs]
        dtypes = [dtype_name(d) for d in output_dtypes]
        values = tuple((name, template_value(value)) for name, value in template or ())
        source, library = self.prepare(given, dtypes, values, chosen.instrumented)
        if verbose:
            print(source.text)
        shapes = [tuple(shape) for shape in output_shapes]
        blocks = self.blocks(source, given, shapes, dtypes, init_value)
        done = launch(
            text.name,
            library,
            blocks,
            tuple(grid),
            tuple(threadgroup),
            chosen,
            values,
            "atomic" in source.text,
        )
        runner.note(text, source, done)
        made = {block.name: block.array for block in blocks if block.kind != INPUT}
        return [as_mlx(made[name], dtype) for name, dtype in zip(text.outputs, dtypes, strict=True)]

    def prepare(
        self,
        given: list[Input],
        dtypes: list[str],
        values: tuple[tuple[str, object], ...],
        instrumented: bool,
    ) -> tuple[Signature, Library]:
        types = [x.type for x in given]
        key = (tuple(types), tuple(dtypes), tuple((n, type(v), v) for n, v in values), instrumented)
        if key not in self.built:
            source = signature(self.text, types, dtypes, list(values))
            self.built[key] = (source, build(lower(source), instrumented))
        return self.built[key]

    def blocks(
        self,
        source: Signature,
        given: list[Input],
        shapes: list[tuple[int, ...]],
        dtypes: list[str],
        init_value: float | None,
    ) -> list[Block]:
        inputs = dict(zip(self.text.inputs, given, strict=True))
        outputs = dict(zip(self.text.outputs, zip(shapes, dtypes, strict=True), strict=True))
        found = []
        for p in source.parameters:
            if p.kind == "output":
                found.append(output_block(p.name, *outputs[p.of], init_value))
            else:
                array = inputs[p.of].array if p.kind == "input" else inputs[p.of].fact(p.kind)
                found.append(Block(p.name, INPUT, array, inputs[p.of].skew if p.kind == "input" else 0))
        return found


def expect(what: str, names: Sequence[str], given: Sequence[object]) -> None:
    if len(names) != len(given):
        raise ValueError(
            f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(given)}."
        )


def template_value(value: object) -> object:
    """int and bool stay, dtypes become their names."""
    if isinstance(value, bool | int):
        return value
    return dtype_name(value)


def kernel_maker(runner: Callable[[], Runner]) -> Callable[..., StandIn]:
    """A function with the arguments of `mx.fast.metal_kernel`; `runner` is asked at each launch."""

    def metal_kernel(
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object = None,
    ) -> StandIn:
        text = KernelText(name, tuple(input_names), tuple(output_names), source, header, atomic_outputs)
        return StandIn(runner, text, ensure_row_contiguous)

    return metal_kernel
