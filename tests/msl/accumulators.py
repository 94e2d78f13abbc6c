"""How many floats a thread accumulates into, by declaration: what must stay in registers while a loop runs.

The rule. A local variable of floats (an array, vector, matrix or struct counts all its floats, a simdgroup matrix 2)
is an accumulator if it is assigned from itself other than as a factor: `a += x`, `a = fma(x, y, a)`, `a = max(a, x)`,
`simdgroup_multiply_accumulate(a, x, y, a)`; or if it is handed to a function that does so with that parameter.
Not `w = fma(w, scale, bias)` nor `w *= scale`. Counted are a function's own and those of the worst function it calls.
Types are clang's, after the templates are filled in.
"""

import functools
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .build import HERE, KERNEL, CompileError, clang
from .lower import lower
from .signature import Signature

Node = dict[str, Any]
Records = dict[
    str, list[list[str]]
]  # the members' types of each struct, and of each filled-in struct template
THIS = "this"
FLOATS = {"float": 1, "half": 1, "bfloat": 1, "_Float16": 1, "__bf16": 1, "float16_t": 1, "bfloat16_t": 1}
FUNCTIONS = ("FunctionDecl", "CXXMethodDecl")
RECORDS = ("CXXRecordDecl", "ClassTemplateSpecializationDecl")
THROUGH = {  # expressions that name a part of their first operand, or the same thing
    *("ImplicitCastExpr", "ParenExpr", "ArraySubscriptExpr", "MemberExpr", "CStyleCastExpr", "UnaryOperator"),
    *("CXXMemberCallExpr", "MaterializeTemporaryExpr", "ExprWithCleanups", "CXXFunctionalCastExpr"),
    *("CXXConstructExpr", "PseudoObjectExpr"),
}


def children(node: Node) -> list[Node]:
    return [child for child in node.get("inner", ()) if child]


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in children(node):
        yield from walk(child)


def syntax_tree(source: Signature) -> list[Node]:
    """Clang's, of the kernel's text alone: it is put into a namespace by which the dump is filtered."""
    head, line, text = lower(source, with_entry=False).partition('#line 1 "metal"\n')
    wrapped = f"{head}namespace msl_kernel {{\n{line}{text}\n}}\n"
    command = clang(
        *KERNEL, "-fsyntax-only", "-Xclang", "-ast-dump=json", "-Xclang", "-ast-dump-filter=msl_kernel"
    )
    done = subprocess.run(
        [*command, "-x", "c++", "-I", str(HERE / "include"), "-"],
        input=wrapped,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise CompileError(done.stderr)
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := done.stdout.find("{", at)) >= 0:
        node, at = decoder.raw_decode(done.stdout, at)
        found.append(node)
    return found


def base(expression: Node) -> str | None:
    """The id of the variable that an lvalue is part of, "this", or None."""
    kind = expression["kind"]
    if kind == "DeclRefExpr":
        return expression["referencedDecl"]["id"]
    if kind == "CXXThisExpr":
        return THIS
    inner = children(expression)
    if kind == "CXXOperatorCallExpr" and callee(expression)[1] == "operator[]":
        return base(inner[1])
    return base(inner[0]) if kind in THROUGH and inner else None


def callee(call: Node) -> tuple[str | None, str]:
    """Id and name of the called function."""
    for node in walk(children(call)[0]):
        if node["kind"] == "DeclRefExpr":
            return node["referencedDecl"]["id"], node["referencedDecl"].get("name", "")
        if node["kind"] == "MemberExpr":
            return node.get("referencedMemberDecl"), node.get("name", "")
    return None, ""


def mentions(expression: Node, variable: str) -> bool:
    """Whether `variable` occurs other than as a factor."""
    kind, inner = expression["kind"], children(expression)
    if kind == "DeclRefExpr":
        return expression["referencedDecl"]["id"] == variable
    if kind == "CXXThisExpr":
        return variable == THIS
    if kind == "BinaryOperator" and expression["opcode"] in ("*", "/"):
        return False
    if kind in ("CallExpr", "CXXOperatorCallExpr"):
        name = callee(expression)[1]
        if name in ("operator*", "operator/"):
            return False
        inner = inner[3:] if name == "fma" else inner[1:]
    return any(mentions(child, variable) for child in inner)


@dataclass(slots=True)
class Function:
    """One instantiated function: its variables' types, which of them it accumulates into, whom it calls with what."""

    name: str
    parameters: list[str]
    types: dict[str, str] = field(default_factory=dict)
    same: dict[str, str | None] = field(default_factory=dict)  # a pointer and what it points into
    into: set[str] = field(default_factory=set)
    calls: list[tuple[str, str | None, list[str | None]]] = field(
        default_factory=list
    )  # id, object, arguments

    def root(self, variable: str | None) -> str | None:
        while variable in self.same and self.same[variable] != variable:
            variable = self.same[variable]
        return variable


def type_of(node: Node) -> str:
    return str(node["type"].get("desugaredQualType", node["type"]["qualType"]))


def read_variable(function: Function, node: Node) -> None:
    kind = type_of(node)
    if node.get("storageClass") == "static":  # threadgroup memory
        return
    if kind.rstrip().endswith(("*", "&")) or "(&)" in kind:
        inner = children(node)
        function.same[node["id"]] = base(inner[0]) if inner else None
    else:
        function.types[node["id"]] = kind


def read_assignment(function: Function, node: Node) -> None:
    """Notes a variable that is assigned from itself."""
    inner = children(node)
    if node["kind"] == "CompoundAssignOperator":
        target, own = base(inner[0]), node["opcode"] in ("+=", "-=")
    elif node["kind"] == "CXXOperatorCallExpr":
        name, target = callee(node)[1], base(inner[1])
        own = name in ("operator+=", "operator-=")
        own = own or (name == "operator=" and target is not None and mentions(inner[2], target))
    else:
        target = base(inner[0])
        own = node["opcode"] == "=" and target is not None and mentions(inner[1], target)
    if own and target is not None:
        function.into.add(function.root(target) or target)


def read_call(function: Function, node: Node) -> None:
    of, name = callee(node)
    arguments = [function.root(base(argument)) for argument in children(node)[1:]]
    if name == "simdgroup_multiply_accumulate" and arguments[0] is not None and arguments[0] == arguments[3]:
        function.into.add(arguments[0])
    elif of is not None:
        called_on = function.root(base(children(node)[0])) if node["kind"] == "CXXMemberCallExpr" else None
        function.calls.append((of, called_on, arguments))


def read_function(node: Node) -> Function:
    parameters = [child["id"] for child in children(node) if child["kind"] == "ParmVarDecl"]
    function = Function(node["name"], parameters)
    body = next(child for child in children(node) if child["kind"] == "CompoundStmt")
    nodes = list(walk(body))
    for found in nodes:
        if found["kind"] == "VarDecl":
            read_variable(function, found)
    for found in nodes:
        if found["kind"] in ("CompoundAssignOperator", "CXXOperatorCallExpr", "BinaryOperator"):
            read_assignment(function, found)
        if found["kind"] in ("CallExpr", "CXXMemberCallExpr"):
            read_call(function, found)
    return function


def follow_calls(functions: dict[str, Function]) -> None:
    """What a callee accumulates into through a parameter, or as its object, its caller accumulates into."""
    changed = True
    while changed:
        changed = False
        for function in functions.values():
            before = len(function.into)
            for of, called_on, arguments in function.calls:
                if of not in functions:
                    continue
                inside = functions[of]
                pairs = [*zip(inside.parameters, arguments, strict=False), (THIS, called_on)]
                function.into |= {given for name, given in pairs if name in inside.into and given is not None}
            changed = changed or len(function.into) != before


def floats_in(kind: str, records: Records) -> int:
    """How many floats a value of this type holds; 0 for integers and pointers; of a struct template, the largest."""
    kind = re.sub(r"\b(const|volatile|struct|class|metal::|msl_kernel::)\s?", "", kind).strip()
    sizes = re.search(r"((?:\[\d+\])+)$", kind)
    if sizes:
        count = 1
        for size in re.findall(r"\d+", sizes[1]):
            count *= int(size)
        return count * floats_in(kind[: sizes.start()], records)
    vector = re.fullmatch(r"(?:packed_)?vec<(\w+), (\d)>|(float|half|bfloat)(\d)", kind)
    if vector:
        return FLOATS.get(vector[1] or vector[3], 0) * int(vector[2] or vector[4])
    if kind.startswith(
        ("simdgroup_matrix<", "simdgroup_float8x8", "simdgroup_half8x8", "simdgroup_bfloat8x8")
    ):
        return 2
    name = kind.split("<")[0]
    if name in records:
        return max(sum(floats_in(member, records) for member in members) for members in records[name])
    return FLOATS.get(kind, 0)


def own_floats(function: Function, records: Records) -> int:
    return sum(floats_in(kind, records) for name, kind in function.types.items() if name in function.into)


@functools.cache
def accumulators(source: Signature) -> int:
    """Of a kernel's text with its template arguments; see the rule above."""
    nodes = [node for tree in syntax_tree(source) for node in walk(tree)]
    functions = {
        node["id"]: read_function(node)
        for node in nodes
        if node["kind"] in FUNCTIONS
        and "mangledName" in node
        and any(child["kind"] == "CompoundStmt" for child in children(node))
    }
    records: Records = {}
    for node in nodes:
        if node["kind"] in RECORDS and node.get("completeDefinition") and "name" in node:
            members = [type_of(child) for child in children(node) if child["kind"] == "FieldDecl"]
            records.setdefault(node["name"], []).append(members)
    follow_calls(functions)

    @functools.cache
    def live(of: str) -> int:
        function = functions[of]
        below = {called for called, _, _ in function.calls if called in functions and called != of}
        return own_floats(function, records) + max((live(called) for called in below), default=0)

    kernels = [key for key, f in functions.items() if f.name.startswith("custom_kernel_")]
    if not kernels:
        raise CompileError("clang's syntax tree has no kernel in it")
    return max(live(key) for key in kernels)
