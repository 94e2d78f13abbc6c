"""One operation of a traced round: does it compute a row from that row alone, here, and why?

`RULES` knows every primitive that may occur in a round of a target; anything else is unknown, and the answer for the
whole round is then promise (b). Names and arguments are those of MLX 0.32's `primitives.h` and `fast_primitives.h`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp import exactness_metal as metal
from mlx_mtp.exactness_graph import Node
from mlx_mtp.exactness_metal import Answer, Backend
from mlx_mtp.kernels.operations import ADD_NORM, ATTEND, EXPERTS, NORM_ROTATE, PROJECT

SUMS = (2, 3)  # Reduce: And, Or, Sum, Prod, Min, Max
ASSIGNS = {"Scatter": 4, "ScatterAxis": 1, "SliceUpdate": 4}  # their ReduceType None
KERNEL_PREFIX = "custom_kernel_"
HEAD_CHOOSE = "head_choose"


@dataclass(frozen=True, slots=True)
class Measured:
    """What bitwise comparisons of rows in passes of 1 to 17 found on this machine; empty: nothing was compared.

    products by (K, N), attention by head size, masked for a softmax over more masked keys, mixture for all layers of
    experts, choice for head and choice of tokens in one, rotation for the norm and rotation of heads, addition for
    residual rows with their norms; True where equal.
    """

    products: Mapping[tuple[int, int], bool] = field(default_factory=dict)
    attention: Mapping[int, bool] = field(default_factory=dict)
    masked: bool | None = None
    mixture: bool | None = None
    choice: bool | None = None
    rotation: bool | None = None
    addition: bool | None = None

    def of(self, operation: str) -> bool | None:
        """Whether all of one operation's comparisons were equal; None where there were none."""
        alone = {
            EXPERTS: self.mixture,
            HEAD_CHOOSE: self.choice,
            NORM_ROTATE: self.rotation,
            ADD_NORM: self.addition,
        }
        if operation in alone:
            return alone[operation]
        found = self.products if operation == PROJECT else self.attention
        return all(found.values()) if found else None


@dataclass(frozen=True, slots=True)
class Here:
    """The machine: where MLX computes, what was compared there, and which operations' kernels its self-test passed."""

    backend: Backend
    measured: Measured = Measured()
    passed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Setting:
    """What a node cannot tell by itself.

    varies: which sizes of a pass change the length it reduces; resized: which change the shape of its output; fixed:
    whether its second input was there before the round.
    """

    here: Here
    varies: frozenset[str] = frozenset()
    resized: frozenset[str] = frozenset()
    fixed: bool = False


Rule = Callable[[Node, Setting], Answer]


def judge(node: Node, setting: Setting) -> Answer:
    """Row-invariant: yes, no, or None where no rule knows the operation."""
    rule = RULES.get(node.op)
    if rule is None:
        return None, "no rule for this operation"
    if rule not in (moves, custom_kernel, random_bits) and not _has_numbers(node):
        return True, "whole numbers and truth values, which nothing rounds"
    return rule(node, setting)


def _has_numbers(node: Node) -> bool:
    """Whether it reads or gives numbers that rounding touches."""
    return any(mx.issubdtype(value.dtype, mx.inexact) for value in (*node.inputs, *node.outputs))


def moves(node: Node, setting: Setting) -> Answer:
    return True, "moves values, computes none"


def assigns(node: Node, setting: Setting) -> Answer:
    if node.arguments[0] != ASSIGNS[node.op]:
        return False, "adds values up in the order in which they arrive"
    return True, "puts a row's own values into its own place"


def element(node: Node, setting: Setting) -> Answer:
    return True, "each value from its own operands"


def compares(node: Node, setting: Setting) -> Answer:
    """Order statistics over one axis: exact in any order, unless other rows are among what is compared."""
    if setting.varies & {"rows", "batch"}:
        return False, "compares values of several rows"
    return True, "compares values of one row, which rounds nothing"


def reduces(node: Node, setting: Setting) -> Answer:
    """Sums, products, maxima: arguments are the kind and the axes."""
    if node.arguments[0] not in SUMS:
        return compares(node, setting)
    return sums(node, setting)


def sums(node: Node, setting: Setting) -> Answer:
    """Whatever adds up values along one row."""
    if setting.varies & {"rows", "batch"}:
        return False, "adds up values of several rows"
    backend = setting.here.backend
    if backend.kind == "cpu":
        if setting.varies and node.op == "Softmax":
            return _as_measured(setting.here.measured.masked, "a softmax over keys of which more are masked")
        if setting.varies:
            return None, f"its length changes with {_listed(setting.varies)}"
        return True, "a row's own values, in an order that only their number decides"
    if not backend.is_read:
        return _not_read(backend)
    if node.op == "Reduce":
        return metal.summed(node, backend)
    if node.op in ("Softmax", "LogSumExp"):
        return metal.softmax(node, backend, setting.varies)
    return metal.normalised(node, backend)


def multiplies(node: Node, setting: Setting) -> Answer:
    """Rows times a matrix, or the products inside attention."""
    here = setting.here
    if setting.varies & {"rows", "batch"}:
        return False, "adds up values of several rows"
    depth, columns = node.inputs[0].shape[-1], node.outputs[0].shape[-1]
    if here.backend.kind == "metal":
        if not here.backend.is_read:
            return _not_read(here.backend)
        rule = metal.quantized_product if node.op == "QuantizedMatmul" else metal.product
        return rule(node, here.backend)
    if not setting.fixed:
        if len(node.inputs[0].shape) != 4:
            return None, "a product of two computed arrays that is none of attention's"
        return _measured_attention(node, setting)
    equal = here.measured.products.get((depth, columns))
    if node.op == "QuantizedMatmul" and equal is not False:
        return True, "row by row in MLX's own code for CPUs"
    return _as_measured(equal, "rows times a matrix, on the BLAS that MLX runs on")


def gathers(node: Node, setting: Setting) -> Answer:
    """Rows times the experts that they chose."""
    here = setting.here
    if (
        here.measured.mixture is False and here.measured.of(PROJECT) is not False
    ):  # else the router may be to blame
        return False, "measured here: a row's experts give other bits in passes of other sizes"
    if here.backend.kind == "metal" and not here.backend.is_read:
        return _not_read(here.backend)
    return metal.gathered(node, here.backend)  # MLX's CPU code goes pair by pair as well


def fused_attention(node: Node, setting: Setting) -> Answer:
    backend = setting.here.backend
    if backend.kind == "cpu":
        return None, "MLX has no fused attention on CPUs"
    return metal.attention(node, backend) if backend.is_read else _not_read(backend)


def random_bits(node: Node, setting: Setting) -> Answer:
    """Noise is a function of its key and of its shape."""
    if setting.resized:
        return False, f"noise whose shape changes with {_listed(setting.resized)}"
    return True, "noise that no size of a pass enters"


def quantizes(node: Node, setting: Setting) -> Answer:
    return True, "each group of a row by itself"


def custom_kernel(node: Node, setting: Setting) -> Answer:
    """Ours, by name: made to be invariant, and believed where this machine found it so."""
    here, family = setting.here, kernel_family(node)
    if family is None:
        return None, f"a kernel that is not ours: {node.arguments[0]}"
    operation = KERNELS[family]
    found = here.measured.of(operation)
    if found is False:
        return False, "measured here: it gives a row other bits in passes of other sizes"
    if found is None and operation not in here.passed:
        return None, "made to be row-invariant, but no self-test of this machine says so"
    return True, "one order of sums for any number of rows, found equal bit by bit on this machine"


def kernel_family(node: Node) -> str | None:
    """Which of our kernels a node launches."""
    name = str(node.arguments[0]).removeprefix(KERNEL_PREFIX)
    found = [family for family in KERNELS if name == family or name.startswith(f"{family}_")]
    return max(found, key=len, default=None)


def _measured_attention(node: Node, setting: Setting) -> Answer:
    """Products with keys and values, as many as a bucket or ring holds: masked ones must add exact zeros."""
    sizes = {node.inputs[0].shape[-1], node.outputs[0].shape[-1]}
    found = [equal for dim, equal in setting.here.measured.attention.items() if dim in sizes]
    return _as_measured(all(found) if found else None, "attention over a bucket or ring of keys")


def _as_measured(equal: bool | None, what: str) -> Answer:
    if equal is None:
        return None, f"{what}; not compared on this machine"
    if equal:
        return True, f"measured here: {what}: the same bits in passes of every size"
    return False, f"measured here: {what}: other bits in passes of other sizes"


def _not_read(backend: Backend) -> Answer:
    version, read = (".".join(map(str, release)) for release in (backend.mlx, metal.READ_IN))
    return None, f"MLX's kernels were read in {read}, this is {version}"


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


# Our kernels that may run in a pass of the target, by the start of their names, and the operation that they compute.
KERNELS: dict[str, str] = {
    "verify_qmm": PROJECT,
    "verify_gemm": PROJECT,
    "verify_attention": ATTEND,
    "verify_experts": EXPERTS,
    "norm_rotate": NORM_ROTATE,
    "add_norm": ADD_NORM,
    "head": HEAD_CHOOSE,
    "choose": HEAD_CHOOSE,
}

_MOVES = """AsStrided Broadcast BroadcastAxes Contiguous Copy ExpandDims Flatten Reshape Slice Split Squeeze
StopGradient Transpose Unflatten View Concatenate Pad Gather GatherAxis DynamicSlice DynamicSliceUpdate Select Full
Arange Depends NumberOfElements"""
_ELEMENT = """Abs Add AsType BitwiseBinary BitwiseInvert Ceil Cos Divide DivMod Equal Erf ErfInv Exp Expm1 Floor
FloorDivide Greater GreaterEqual Less LessEqual Log Log1p LogAddExp LogicalAnd LogicalNot LogicalOr Maximum Minimum
Multiply Negative NotEqual Power Remainder RoPE Round Sigmoid Sign Sin Sqrt Square Subtract Tan Tanh ConvertFP8"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), moves),
    **dict.fromkeys(_ELEMENT.split(), element),
    **dict.fromkeys(ASSIGNS, assigns),
    **dict.fromkeys(("ArgReduce", "ArgSort", "ArgPartition", "Partition", "Sort", "SearchSorted"), compares),
    **dict.fromkeys(("Softmax", "LogSumExp", "RMSNorm", "LayerNorm", "Scan"), sums),
    **dict.fromkeys(("Matmul", "AddMM", "QuantizedMatmul"), multiplies),
    **dict.fromkeys(("GatherMM", "GatherQMM"), gathers),
    "Reduce": reduces,
    "ScaledDotProductAttention": fused_attention,
    "RandomBits": random_bits,
    "Quantize": quantizes,
    "CustomKernel": custom_kernel,
}
