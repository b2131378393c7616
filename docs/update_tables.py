"""Bring the tables of README.md and docs/ up to date with results/.

    python docs/update_tables.py

A table below a comment that names a JSON file is replaced by the one in the Markdown file of that name, and the commit
and date in the text after it by the file's. Rows of ratios are computed from the folders that they name.
"""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
TABLE = re.compile(
    r"(?P<marker><!-- (?P<file>results/\S+) -->\n+)(?P<table>(?:\|[^\n]*\n)+)(?P<rest>.*?)(?=\n#|\n<!--|\Z)", re.S
)
SOURCE = re.compile(r"commit \w+, (?P<machine>(?:[^,\n]+,\s){0,2}?)(?P<date>\d{4}-\d\d-\d\d|DATE)")
RATIOS = re.compile(r"^(\| (?P<what>[\w ,-]+?) +)\| [\d.]+ \| [\d.]+ \| `(?P<folder>\w+)/` \|$", re.M)
FIELDS = {"multiply-adds": "gmacs", "activation memory of that step": "activation_memory_bytes"}


def update_table(found: re.Match) -> str:
    """A marked table with the text up to the next heading or marker, from its result."""
    file = ROOT / found["file"]
    record = json.loads(file.read_text())
    tables = re.findall(r"(?:^\|.*\n)+", file.with_suffix(".md").read_text(), re.M)
    head = found["table"].partition("\n")[0].split("|")[1].strip()
    same = [table for table in tables if table.partition("\n")[0].split("|")[1].strip() == head]
    if not same:
        raise SystemExit(f"error: {file.with_suffix('.md')} must hold a table whose first head is {head!r}.")
    source = f"commit {record['commit'][:7]}, \\g<machine>{record['date'][:10]}"
    return found["marker"] + same[0] + SOURCE.sub(source, found["rest"], count=1)


def update_ratio(found: re.Match) -> str:
    """A row of InTI's figures divided by Naive's."""
    rows = json.loads((ROOT / "results/benchmarks" / found["folder"] / "benchmark.json").read_text())["rows"]
    field = FIELDS.get(found["what"], "seconds")
    ratios = [f"{rows[name][field] / rows['naive'][field]:.3f}" for name in ("inti", "inti_dwconv")]
    return f"{found[1]}| {' | '.join(ratios)} | `{found['folder']}/` |"


def updated(text: str) -> str:
    """A page with its tables as results/ has them."""
    return RATIOS.sub(update_ratio, TABLE.sub(update_table, text))


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text()
        new = updated(old)
        if new != old:
            page.write_text(new)
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
