"""Metal source to one C++ file: lines stay where they are, so that compilers and faults name lines of the source."""

import re

from .signature import ATTRIBUTES, Parameter, Signature

THREADGROUP = re.compile(r"(?<=[;{})])(\s*)threadgroup\b(?=[^;=]*?;)")
SWIZZLE = re.compile(r"(?:\.|->)\s*([xyzw]{2,4}|[rgba]{1,4})\b")
ENTRY = """
extern "C" __attribute__((visibility("default"), no_sanitize("thread")))
void msl_entry(void** b, const msl_position* t) {{ {call}({arguments}); }}
extern "C" {{
extern char __start_msl_threadgroup[] __attribute__((weak, visibility("hidden")));
extern char __stop_msl_threadgroup[] __attribute__((weak, visibility("hidden")));
__attribute__((visibility("default"))) void msl_threadgroup_memory(char** range) {{
  range[0] = __start_msl_threadgroup;
  range[1] = __stop_msl_threadgroup;
}}
}}
"""


def without_comments(text: str) -> str:
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found.group()), text, flags=re.DOTALL
    )


def is_pointer(declared: str) -> bool:
    """Whether `T* name = ...` or `T& name` is declared, rather than a variable; template arguments do not count."""
    head = re.split(r"[\[=,(]", re.sub(r"<[^;<>]*(<[^<>]*>)?[^;<>]*>", "", declared))[0]
    return "*" in head or "&" in head


def with_static_threadgroup_memory(text: str) -> str:
    """Variables in threadgroup memory are static, in a section of their own: one copy for a whole threadgroup."""

    def rewritten(found: re.Match[str]) -> str:
        declared = text[found.end() : text.index(";", found.end())]
        word = "threadgroup" if is_pointer(declared) else "MSL_THREADGROUP_VARIABLE"
        return found.group(1) + word

    return THREADGROUP.sub(rewritten, text)


def swizzle_members(size: int, names: set[str]) -> str:
    """Properties of vec<T, size> for those of `names` that it has: `xy` can be read and, without repeats, assigned."""
    members = []
    for name in sorted(names):
        places = ["xyzw".find(c) if c in "xyzw" else "rgba".find(c) for c in name]
        if max(places) >= size:
            continue
        of = [f"{'xyzw'[place]}" for place in places]
        kind = f"vec<T, {len(of)}>" if len(of) > 1 else "T"
        members.append(f"{kind} get_{name}() const {{ return {kind}({', '.join(of)}); }}")
        put = ""
        if len(set(of)) == len(of):
            to = "".join(f" {c} = v{'.' + 'xyzw'[i] if len(of) > 1 else ''};" for i, c in enumerate(of))
            members.append(f"void put_{name}({kind} v) {{{to} }}")
            put = f", put=put_{name}"
        members.append(f"__declspec(property(get=get_{name}{put})) {kind} {name};")
    return " ".join(members)


def swizzles(text: str) -> str:
    names = set(SWIZZLE.findall(text))
    return "".join(f"#define MSL_SWIZZLES_{size} {swizzle_members(size, names)}\n" for size in (2, 3, 4))


def argument(place: int, parameter: Parameter) -> str:
    const = "" if parameter.kind == "output" else "const "
    return f"{'*' if parameter.reference else ''}({const}{parameter.type}*)b[{place}]"


def attribute(name: str) -> str:
    return f"uint3(t->{name}.x, t->{name}.y, t->{name}.z)" if ATTRIBUTES[name] == "uint3" else f"t->{name}"


def lower(source: Signature, with_entry: bool = True) -> str:
    """The C++ text of one kernel; without the entry (which casts address spaces away) for the lint."""
    text = without_comments(source.text)
    text = re.sub(r"\[\[(host_name\([^\n]*?\)|kernel|buffer\(\d+\))\]\]", "", text)
    text = with_static_threadgroup_memory(text)
    arguments = [argument(place, parameter) for place, parameter in enumerate(source.parameters)]
    arguments += [attribute(name) for name in source.attributes]
    entry = ENTRY.format(call=source.call, arguments=", ".join(arguments)) if with_entry else ""
    return f'{swizzles(text)}#include "mlx_utils.h"\n#line 1 "metal"\n{text}{entry}'
