"""Compare methods.

    python scripts/compare.py costs
    python scripts/compare.py methods --help
    python scripts/compare.py hosts --help
    python scripts/compare.py weights --help

`costs` prints multiply-adds and parameters of the papers' models beside the published figures, counted on the meta
device: 16 frames of 224 x 224, one clip, under a minute. The others hand what follows to hf_inti.comparison: `methods`
to run, `hosts` and `weights` to the modules of these names.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import groupby
from pathlib import Path
from textwrap import fill

from hf_inti import InTIClipVisionConfig
from hf_inti.comparison.host_costs import count_host
from hf_inti.measure.costs import count_costs
from hf_inti.measure.jobs import write_json
from hf_inti.measure.records import provenance, source_line
from hf_inti.measure.tables import markdown_table
from hf_inti.papers.published import REASONS, TABLES, TOWERS, Table
from hf_inti.papers.published_hosts import HOST_MODELS, HOST_REASONS, HOST_TABLES, HostTable
from hf_inti.training.cli import run_script


HEADS = ["model", "size", "reading", "GFLOPs", "GMACs", "diff", "M", "ours", "diff", "why"]
HOST_HEADS = ["model", "setting", "GFLOPs", "ours", "diff", "why"]
INTRODUCTION = """\
GFLOPs and M (millions of parameters) are the InTI paper's; GMACs and what follows M are ours: multiply-adds with
attention's two products, without norms, activations, softmax and weighted sums. A reading is a configuration that the
row may mean, the first the likeliest; temp is UniFormerV2's modules. Positions of L/14 are twice those named. Why
differences above 0.5 remain is told below, under the name in the last column. The papers of STA and STTS count norms,
so in their tables we do too.
"""


def beside(published: float | None, counted: float) -> list[str]:
    """The cells of a published figure, ours, and the difference."""
    if published is None:
        return ["-", f"{counted:.1f}", "-"]
    return [str(published), f"{counted:.1f}", f"{round(counted - published, 1) + 0.0:+.1f}"]  # + 0.0: no -0.0


def rows_of(table: Table) -> list[list[str]]:
    """A line for each reading of each row."""
    lines = []
    for row in table.rows:
        first = [row.model, row.tower]
        if not row.interpretations:
            lines.append([*first, "", str(row.gflops), "-", "-", str(row.params), "-", "-", "not in this package"])
        for reading in row.interpretations:
            config = InTIClipVisionConfig(**TOWERS[row.tower], **reading.options, num_labels=table.num_labels)
            total = count_costs(config)["total"]
            cells = beside(row.gflops, total.gmacs) + beside(row.params, total.mparams)
            lines.append([*first, reading.name, *cells, ", ".join(reading.reasons)])
    return lines


def host_rows(table: HostTable) -> list[list[str]]:
    """A line for each row, counts of one model together; without torchvision its models' are missing."""
    lines = []
    for name, group in groupby(table.rows, key=lambda row: row.model):
        rows = list(group)
        try:
            counts = count_host(HOST_MODELS[name], [(row.method, row.options) for row in rows])
        except ImportError:
            counts = [None] * len(rows)
        for row, counted in zip(rows, counts, strict=True):
            first = [name, row.setting, str(row.gflops)]
            if counted is None:
                lines.append([*first, "-", "-", "torchvision"])
                continue
            share = 100 * (counted * row.views / row.gflops - 1)
            lines.append([*first, f"{counted * row.views:.1f}", f"{round(share, 1) + 0.0:+.1f}%", row.reason])
    return lines


def short_table() -> list[list[str]]:
    """InTI and Naive on Kinetics-400 in few columns, for the README."""
    rows = [["model", "after blocks", "GFLOPs, paper", "counted", "counted, `dwconv`", "top-1, paper"]]
    for row in TABLES[0].rows:
        if "temp" in row.model or not row.interpretations:
            continue
        options = [reading.options for reading in row.interpretations]
        counts = [
            count_costs(InTIClipVisionConfig(**TOWERS[row.tower], **each, num_labels=400))["total"].gmacs
            for each in options
        ]
        naive = row.model == "Naive"
        size = row.tower[0]
        layers = "" if naive else ", ".join(map(str, options[0]["compression_layers"]))
        cells = [
            f"CLIP ViT-{row.tower}, Naive" if naive else f"InTI-{size}",
            layers,
            str(row.gflops),
            f"{counts[0]:.1f}",
        ]
        rows.append([*cells, "" if naive else f"{counts[1]:.1f}", str(row.top1[0])])
    return rows


def cost_tables() -> list[tuple[str, list[list[str]], set[int]]]:
    """Title, rows with their heads first, and the columns of text, of every table."""
    tables = [("InTI on Kinetics-400", short_table(), {0, 1})]
    tables += [(table.title, [HEADS, *rows_of(table)], {0, 1, 2, 9}) for table in TABLES]
    tables += [(table.title, [HOST_HEADS, *host_rows(table)], {0, 1, 5}) for table in HOST_TABLES]
    parts = count_costs(InTIClipVisionConfig(**TOWERS["B/16"], num_labels=400)).items()
    rows = [[part, f"{cost.gmacs:.2f}", f"{cost.mparams:.2f}"] for part, cost in parts]
    tables.append(("InTI-B 5,7 by part", [["part", "GMACs", "M params"], *rows], {0}))
    return tables


def costs(output_dir: str | None) -> None:
    """Print every table of published costs with our counts; write costs.md and costs.json to `output_dir`."""
    record, tables = provenance(), cost_tables()
    text = INTRODUCTION
    for title, rows, texts in tables:
        text += f"\n{title}\n\n{markdown_table(rows[0], rows[1:], texts)}"
    text += "\nWhy:\n"
    for name, reason in (REASONS | HOST_REASONS).items():
        text += fill(f"- {name}: {reason}", width=120, subsequent_indent="  ") + "\n"
    print(text)
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "costs.md").write_text(f"{text}\n{source_line(record)}\n")
        write_json(folder / "costs.json", {**record, "tables": {title: rows for title, rows, _ in tables}})


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_costs = commands.add_parser("costs", help="Print costs and published costs.")
    of_costs.add_argument("--output_dir", help="Folder for costs.md and costs.json, such as results.")
    commands.add_parser("methods", help="Train, evaluate and measure methods.", add_help=False)
    commands.add_parser("hosts", help="Train other video models, and evaluate them compressed.", add_help=False)
    commands.add_parser("weights", help="Say what the weights of trained InTI models follow.", add_help=False)
    args, rest = parser.parse_known_args()
    if args.command == "hosts":
        from hf_inti.comparison.hosts import main as hosts

        return hosts(rest)
    if args.command == "methods":
        from hf_inti.comparison.run import main as methods  # which needs much that costs does not

        return methods(rest)
    if args.command == "weights":
        from hf_inti.comparison.weights import main as weights

        return weights(rest)
    if rest:
        of_costs.error(f"costs takes --output_dir alone, got {' '.join(rest)}.")
    costs(args.output_dir)
    return 0


if __name__ == "__main__":
    run_script(main)
