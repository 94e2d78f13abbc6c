"""Complaints about a kernel's text that running it cannot bring up.

Address spaces: the text is compiled once more, for its diagnostics only, with `device`, `constant` and `threadgroup`
as real address spaces. Clang then refuses what Metal refuses, and a few things that Metal allows: those are left out.
"""

import re
import subprocess

from .build import HERE, KERNEL, clang
from .lower import THREADGROUP, is_pointer, lower, without_comments
from .signature import FACTS, KernelText, Signature

DIAGNOSTIC = re.compile(r"^(?P<place>[^:\n]+:\d+):\d+: (?P<kind>error|note): (?P<message>.*)$", re.MULTILINE)
SPACE = re.compile(r"address.space|\b(device|constant|threadgroup)\b")
# Metal has member functions for objects in every address space; our vectors' are generic only.
ALLOWED = (
    "'this' argument",
    "'this' object",
    "object parameter",
    "no viable overloaded",
    "cannot be used to construct an object in address space",  # threadgroup atomics
)


# A cast to a pointer: to `device` memory and the like, or it loses the space, which C++ allows and Metal refuses.
CAST = re.compile(r"(?:\(|cast<)\s*((?:const\s+)?[A-Za-z_][\w:]*(?:\s*<[^()]*>)?\s*\*+)\s*[)>]")


def lint(kernel: KernelText, source: Signature) -> list[str]:
    return [
        *threadgroup_variables(kernel),
        *parameter_traps(kernel),
        *casts(source),
        *address_spaces(source),
    ]


def threadgroup_variables(kernel: KernelText) -> list[str]:
    """Metal allows variables in threadgroup memory in kernels only."""
    text = without_comments(kernel.header)
    found = []
    for match in THREADGROUP.finditer(text):
        declared = text[match.end() : text.index(";", match.end())]
        if not is_pointer(declared):
            line = text.count("\n", 0, match.end()) + 1
            found.append(
                f"line {line}: threadgroup variable outside the kernel: {' '.join(declared.split())}"
            )
    return found


def parameter_traps(kernel: KernelText) -> list[str]:
    """A fact about an input that is given because its name is part of a longer word in the body."""
    body = without_comments(kernel.body)
    return [
        f"`{name}_{fact}` is part of a longer name or of a comment, and still adds a parameter: rename it"
        for name in kernel.inputs
        for fact in FACTS
        if f"{name}_{fact}" in kernel.body and not re.search(rf"\b{name}_{fact}\b", body)
    ]


def casts(source: Signature) -> list[str]:
    text = without_comments(source.text)
    return [
        f"line {text.count(chr(10), 0, found.start()) + 1}: `{found[0]}` names no address space"
        for found in CAST.finditer(text)
    ]


def address_spaces(source: Signature) -> list[str]:
    flags = [flag for flag in KERNEL if flag not in ("-fPIC",)]
    command = clang(*flags, "-DMSL_LINT", "-fsyntax-only", "-ferror-limit=0", "-x", "c++", "-I")
    done = subprocess.run(
        [*command, str(HERE / "include"), "-"],
        input=lower(source, with_entry=False),
        capture_output=True,
        text=True,
    )
    found: list[tuple[str, list[str]]] = []
    for match in DIAGNOSTIC.finditer(done.stderr):
        if match["kind"] == "error":
            found.append((f"line {match['place'].rpartition(':')[2]}: {match['message']}", []))
        elif found:
            found[-1][1].append(match["message"])
    return [" | ".join([error, *notes[:1]]) for error, notes in found if is_complaint(error, notes)]


def is_complaint(error: str, notes: list[str]) -> bool:
    if any(allowed in text for allowed in ALLOWED for text in [error, *notes]):
        return False
    return any(SPACE.search(text) for text in [error, *notes])
