"""Writes the tables of models.md from mlx_mtp's own: `python docs/write_models.py`; tests compare the two."""

from pathlib import Path

from mlx_mtp.aliases import ALIASES, Alias
from mlx_mtp.recommend import CONTEXT, TIERS, WHY

PAGE = Path(__file__).with_name("models.md")


def alias_table() -> str:
    """One row an alias."""
    head = "| name | target | drafter | stored as | weight files |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{alias.name}` | `{alias.target}` | `{alias.drafter}` | {layout(alias)} | {size(alias)} |\n"
        for alias in ALIASES
    )


def source_table() -> str:
    """Where each id was read: one row an id."""
    rows = {alias.target: alias.source for alias in ALIASES} | {
        alias.drafter: alias.drafter_source for alias in ALIASES
    }
    checked = {alias.target: alias.verified for alias in ALIASES}
    checked |= {alias.drafter: alias.verified for alias in ALIASES}
    head = "| id | read at | checked on the hub |\n|---|---|---|\n"
    return head + "".join(
        f"| `{repo_id}` | {source} | {'yes' if checked[repo_id] else 'no'} |\n"
        for repo_id, source in sorted(rows.items(), key=lambda row: row[0].casefold())
    )


def tier_table() -> str:
    """What is recommended from how much memory on."""
    head = f"| memory | model, if it fits with {CONTEXT:,} tokens of context | why |\n|---|---|---|\n"
    rows = []
    for least, name in reversed(TIERS):
        memory = f"{least} GB and more" if least else "less"
        rows.append(f"| {memory} | `{name}` | {WHY[name.partition(':')[0]]} |\n")
    return head + "".join(rows)


def layout(alias: Alias) -> str:
    """How the matrices are stored, in words."""
    if alias.bits == 16:
        return "bf16"
    if alias.mlp_bits != alias.bits:
        return f"{alias.bits} bits, dense MLPs {alias.mlp_bits}"
    return f"{alias.bits} bits"


def size(alias: Alias) -> str:
    return "not read" if alias.download_gb is None else f"{alias.download_gb:g} GB"


def filled(page: str) -> str:
    """The page with each table between its two comments."""
    for name, table in (("aliases", alias_table()), ("sources", source_table()), ("tiers", tier_table())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        start, stop = page.index(begin) + len(begin), page.index(end)
        page = page[:start] + table + page[stop:]
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
