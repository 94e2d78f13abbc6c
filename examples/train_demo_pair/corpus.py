"""The training text: Python's standard library, its documentation, and chats made from docstrings."""

from __future__ import annotations

import ast
import inspect
import random
from pathlib import Path

# Whole modules kept out of training (source, documentation page, docstring chats) for evaluation.
HELD_OUT_MODULES = (
    "bisect",
    "calendar",
    "cmd",
    "colorsys",
    "csv",
    "fileinput",
    "fnmatch",
    "glob",
    "graphlib",
    "heapq",
    "linecache",
    "netrc",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "tabnanny",
    "textwrap",
    "timeit",
    "wave",
)
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "ensurepip",
    "turtledemo",
}

Chat = list[dict[str, str]]


def stdlib_files(root: Path, held_out: bool = False) -> list[Path]:
    """The modules trained on, or the held-out ones."""
    files = [p for p in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    return [p for p in files if (p.parent == root and p.stem in HELD_OUT_MODULES) == held_out]


def docs_files(root: Path) -> list[Path]:
    """Pages of the Python documentation (`_sources/*.rst.txt`), without those of held-out modules."""
    pages = [p for p in sorted(root.rglob("*.rst.txt")) if p.name != "changelog.rst.txt"]
    return [p for p in pages if p.name.split(".")[0] not in HELD_OUT_MODULES]


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _first_paragraph(doc: str) -> str:
    return " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())


def _definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public top-level functions and classes, and their public methods, with dotted names."""
    found: list[tuple[str, ast.AST]] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                found += [
                    (f"{node.name}.{m.name}", m)
                    for m in node.body
                    if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")
                ]
    return found


WHAT = (
    "What does {n} do?",
    "what is {n}?",
    "What is {n} for?",
    "Explain {n}",
    "explain {n}.",
    "tell me about {n}",
    "How do I use {n}?",
    "describe {n}",
    "what does {n} do",
    "Can you explain {n}?",
    "{n}?",
)
SHOW = (
    "Show the source of {n}",
    "show me the source of {n}",
    "Show me how {n} is written",
    "How is {n} implemented?",
    "print the code of {n}",
    "source of {n}?",
)
WRITE = (
    "Write a function {s}: {d}",
    "Write a Python function {s}. {d}",
    "write {s}. {d}",
    "Can you write a Python function {s}? {d}",
    "implement {s}: {d}",
)


def docstring_chats(root: Path, path: Path) -> list[tuple[tuple[str, ...], dict[str, str], str]]:
    """-> (question templates, their fields, answer) for one module."""
    source = read_text(path)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    module, out = module_name(root, path), []
    if ast.get_docstring(tree):
        out.append((WHAT, {"n": f"the {module} module"}, _first_paragraph(ast.get_docstring(tree))))
    for name, node in _definitions(tree):
        doc = ast.get_docstring(node)
        summary = _first_paragraph(doc) if doc else ""
        dotted = f"{module}.{name}"
        if 12 < len(summary) < 400:
            out.append((WHAT, {"n": dotted}, summary))
        code = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.FunctionDef) and 3 <= code.count("\n") <= 24 and len(code) < 1000:
            code = inspect.cleandoc("\n" + " " * node.col_offset + code)
            reply = f"```python\n{code}\n```"
            out.append((SHOW, {"n": dotted}, reply))
            if 12 < len(summary) < 160:
                signature = f"{node.name}({', '.join(a.arg for a in node.args.args)})"
                out.append((WRITE, {"s": signature, "d": summary}, reply))
    return [item for item in out if len(item[2]) < 1100]


def render_chat(messages: Chat) -> str:
    """What chat_template.jinja gives for plain messages, as training text (with <bos>)."""
    roles = {"assistant": "model"}
    return "<bos>" + "".join(
        f"<|turn>{roles.get(m['role'], m['role'])}\n{m['content'].strip()}<turn|>\n" for m in messages
    )


def ask(templates: tuple[str, ...], fields: dict[str, str], rng: random.Random) -> str:
    return rng.choice(templates).format(**fields)
