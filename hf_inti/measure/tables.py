"""Tables in Markdown."""

from collections.abc import Collection, Sequence


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table; the columns numbered in `left` are aligned to the left, the others to the right."""
    widths = [max(2, *(len(line[i]) for line in [heads, *lines])) for i in range(len(heads))]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    rows = []
    for line in [heads, *lines]:
        cells = enumerate(zip(line, widths, strict=True))
        rows.append([cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])
