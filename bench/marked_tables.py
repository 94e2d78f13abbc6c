"""Tables that scripts keep in pages, between marks: written into them, or compared with what stands there."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def put(text: str, begin: str, end: str, table: str) -> str:
    """`text` with `table` between its marks; ValueError where they are missing."""
    before, found, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not found or not last:
        raise ValueError(f"the marks {begin} and {end} are missing")
    return f"{before}{begin}\n{table}\n{end}{after}"


def write_or_check(page: Path, made: Callable[[str], str], description: str | None) -> None:
    """Its command line: --write puts what `made` makes of the page into it, --check exits with 1 if it differs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", action="store_true", help=f"put the tables into {page.name}")
    way.add_argument("--check", action="store_true", help=f"exit with 1 if {page.name} has others")
    args = parser.parse_args()
    text = page.read_text(encoding="utf-8")
    try:
        wanted = made(text)
    except ValueError as error:
        sys.exit(f"{page}: {error}")
    if args.write:
        page.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        sys.exit(f"{page} is not what the results say now; run {Path(sys.argv[0]).name} with --write")
