"""The text of a kernel as MLX generates it from a header, a body and the arguments of a call.

`tests/test_msl_signature.py` compares it, byte for byte, with what MLX's own tracing prints.
"""

from dataclasses import dataclass

TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float64": "double",
    "complex64": "complex64_t",
    "bool": "bool",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
ATTRIBUTES = {  # in the order in which MLX appends those that the body names
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
FACTS = {"shape": ("int", "*"), "strides": ("int64_t", "*"), "ndim": ("int", "&")}
SMALL = 8  # inputs of fewer elements are in the constant address space


@dataclass(frozen=True, slots=True)
class KernelText:
    """What was given to `metal_kernel`."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    header: str = ""
    atomic_outputs: bool = False


@dataclass(frozen=True, slots=True)
class InputType:
    """What the text depends on of one input; `small` only for arrays."""

    dtype: str
    scalar: bool
    small: bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """A buffer of the generated function: an input, a fact ("shape", "strides", "ndim") about it, or an output."""

    name: str
    of: str
    kind: str
    type: str
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """The generated text, the name by which the function is called in C++, and its arguments in order."""

    text: str
    call: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]


def template_value(value: object) -> str:
    """A template argument as MLX writes it; dtypes are given by name."""
    return TYPES[value] if isinstance(value, str) else str(int(value))  # type: ignore[call-overload]


def template_kind(value: object) -> str:
    return "typename" if isinstance(value, str) else "bool" if isinstance(value, bool) else "int"


def function_name(
    kernel: KernelText, inputs: list[InputType], outputs: list[str], template: list[tuple[str, object]]
) -> str:
    name = f"custom_kernel_{kernel.name}"
    if template:
        name += "__" + "_".join(template_value(value) for _, value in template).replace("-", "_")
    for given in inputs:
        name += f"_{TYPES[given.dtype]}" + ("s" if given.scalar else "c" if given.small else "")
    return name + "".join(f"_{TYPES[dtype]}" for dtype in outputs)


def parameters_of(kernel: KernelText, inputs: list[InputType], outputs: list[str]) -> list[Parameter]:
    """In MLX's order: each input followed by the facts that the body names as a substring, then the outputs."""
    found = []
    for name, given in zip(kernel.inputs, inputs, strict=True):
        found.append(Parameter(name, name, "input", TYPES[given.dtype], given.scalar))
        for fact, (of_type, mark) in FACTS.items():
            if not given.scalar and f"{name}_{fact}" in kernel.body:
                found.append(Parameter(f"{name}_{fact}", name, fact, of_type, mark == "&"))
    for name, dtype in zip(kernel.outputs, outputs, strict=True):
        of_type = f"atomic<{TYPES[dtype]}>" if kernel.atomic_outputs else TYPES[dtype]
        found.append(Parameter(name, name, "output", of_type))
    return found


def declaration(parameter: Parameter, place: int, small: bool) -> str:
    mark = "&" if parameter.reference else "*"
    space = {"input": "const constant" if small else "const device", "output": "device"}.get(
        parameter.kind, "const constant"
    )
    return f"  {space} {parameter.type}{mark} {parameter.name} [[buffer({place})]]"


def signature(
    kernel: KernelText, inputs: list[InputType], outputs: list[str], template: list[tuple[str, object]]
) -> Signature:
    """`inputs`: of the call; `outputs`: dtype names; `template`: (name, int | bool | dtype name)."""
    parameters = parameters_of(kernel, inputs, outputs)
    small = {name for name, given in zip(kernel.inputs, inputs, strict=True) if given.small}
    attributes = [name for name in ATTRIBUTES if name in kernel.body]
    function = function_name(kernel, inputs, outputs, template)
    values = ", ".join(template_value(value) for _, value in template)
    call = f"{function}<{values}>" if template else function
    lines = [declaration(p, place, p.name in small) for place, p in enumerate(parameters)]
    lines += [f"  {ATTRIBUTES[name]} {name} [[{name}]]" for name in attributes]

    text = kernel.header
    if template:
        text += "template <" + ", ".join(f"{template_kind(v)} {name}" for name, v in template) + ">\n"
    text += f"[[kernel]] void {function}(\n" + ",\n".join(lines) + ") {\n" + kernel.body + "\n}\n"
    if template:
        text += f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({call}) {call};\n'
    return Signature(text, call, tuple(parameters), tuple(attributes))
