"""Decodable and Encodable structs of Swift sources, read far enough to say what JSON they take; no compiler."""

import re
from dataclasses import dataclass
from typing import Any

SCALARS: dict[str, tuple[type, ...]] = {
    "String": (str,),
    "URL": (str,),
    "Int": (int,),
    "Double": (int, float),
    "Bool": (bool,),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One stored property: its key in JSON, its type without `?`, and whether it may be missing or null."""

    key: str
    kind: str
    is_optional: bool


def structs_of(source: str) -> dict[str, list[Field]]:
    """Every struct by name, nested ones too; their names must differ."""
    source = re.sub(r"//[^\n]*", "", source)
    found: dict[str, list[Field]] = {}
    for match in re.finditer(r"struct (\w+): \w*(?:Codable|Decodable|Encodable)", source):
        assert match[1] not in found, f"two structs are called {match[1]}"
        found[match[1]] = fields_of(block_after(source, match.end()))
    return found


def block_after(source: str, start: int) -> str:
    """What stands between the next brace and the one that closes it."""
    begin = source.index("{", start)
    depth = 0
    for at in range(begin, len(source)):
        depth += {"{": 1, "}": -1}.get(source[at], 0)
        if depth == 0:
            return source[begin + 1 : at]
    raise AssertionError("a brace is not closed")


def fields_of(body: str) -> list[Field]:
    own = body
    for match in re.finditer(r"struct \w+", body):
        own = own.replace("{" + block_after(body, match.end()) + "}", "{}")
    keys: dict[str, str] = {}
    coding = re.search(r"enum CodingKeys", own)
    if coding is not None:
        block = block_after(own, coding.end())
        own = own.replace("{" + block + "}", "{}")
        for case in re.findall(r"case ([^\n]+)", block):
            keys |= {name: renamed or name for name, renamed in re.findall(r'(\w+)(?: = "(\w+)")?', case)}
    fields = []
    for name, kind, value in re.findall(r"let (\w+)(?:: ([\w.\[\]?]+))?(?: = ([^\n]+))?", own):
        kind = kind or {"true": "Bool"}.get(value.strip(), value.partition("(")[0])
        assert not keys or name in keys, f"{name} is not among the coding keys, so it would not be coded"
        fields.append(Field(keys.get(name, name), kind.rstrip("?"), kind.endswith("?")))
    return fields


def misfit(structs: dict[str, list[Field]], kind: str, value: Any, where: str = "$") -> str | None:
    """Why JSONDecoder would throw for this value, None where it would not."""
    if kind.startswith("["):
        if not isinstance(value, list):
            return f"{where} is no list"
        found = (misfit(structs, kind[1:-1], one, f"{where}[{i}]") for i, one in enumerate(value))
        return next((why for why in found if why), None)
    if kind in SCALARS:
        is_right = isinstance(value, SCALARS[kind]) and (kind == "Bool") == isinstance(value, bool)
        return None if is_right else f"{where} must be {kind}, is {value!r}"
    if not isinstance(value, dict):
        return f"{where} is no object"
    for field in structs[kind]:
        inner = value.get(field.key)
        if inner is None and not field.is_optional:
            return f"{where}.{field.key} is missing"
        why = None if inner is None else misfit(structs, field.kind, inner, f"{where}.{field.key}")
        if why:
            return why
    return None
