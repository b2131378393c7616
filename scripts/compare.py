"""Compare methods.

    python scripts/compare.py costs
    python scripts/compare.py methods --help

`costs` prints multiply-adds and parameters of the papers' models beside the published figures, counted on the meta
device: 16 frames of 224 x 224, one clip, under a minute. `methods` hands what follows to hf_inti.comparison.run.
"""

from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from textwrap import fill

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from hf_inti import InTIClipVisionConfig
from hf_inti.hosts.videomae import apply_sta
from hf_inti.measure.costs import count_costs
from hf_inti.papers.published import REASONS, TABLES, TOWERS, VIDEOMAE, Table
from hf_inti.training.cli import run_script


HEADS = ["model", "size", "reading", "GFLOPs", "GMACs", "diff", "M", "ours", "diff", "why"]
INTRODUCTION = """\
GFLOPs and M (millions of parameters) are the InTI paper's; GMACs and what follows M are ours: multiply-adds with
attention's two products, without norms, activations, softmax and weighted sums. A reading is a configuration that the
row may mean, the first the likeliest; temp is UniFormerV2's modules. Positions of L/14 are twice those named. Why
differences above 0.5 remain is told below, under the name in the last column.
"""


def print_table(rows: list[list[str]], texts: set[int]) -> None:
    """A Markdown table of `rows`, the first its heads; columns are aligned, those in `texts` to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for n, row in enumerate(rows):
        cells = [cell.ljust(widths[i]) if i in texts else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        print("| " + " | ".join(cells) + " |")
        if n == 0:
            lines = ["-" * (width + 1) + ("-" if i in texts else ":") for i, width in enumerate(widths)]
            print("|" + "|".join(lines) + "|")
    print(flush=True)


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


def videomae_gmacs(sizes: dict, rates: list[int]) -> list[float]:
    """Multiply-adds and norms, in billions, of a VideoMAE on 16 x 224 x 224 with each r of STA.

    Its paper counts with fvcore, which takes a LayerNorm for 5 operations an element, so this does too.
    """
    config = VideoMAEConfig(**sizes, intermediate_size=4 * sizes["hidden_size"], num_labels=400)
    with torch.device("meta"):
        # Eager attention, since the counter does not see inside every fused kernel.
        model = VideoMAEForVideoClassification._from_config(config, attn_implementation="eager").eval()
        model.requires_grad_(False)
        pixel_values = torch.empty(1, config.num_frames, config.num_channels, config.image_size, config.image_size)
    norms, counts = [], []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: norms.append(5 * output.numel()))
    for r in rates:
        norms.clear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            apply_sta(model, r=r)(pixel_values)
        counts.append((counter.get_total_flops() / 2 + sum(norms)) / 1e9)
    return counts


def costs() -> None:
    """Print the InTI paper's tables and Table 2 of the STA paper beside our counts."""
    print(INTRODUCTION)
    for table in TABLES:
        print(f"{table.title}\n")
        print_table([HEADS, *rows_of(table)], texts={0, 1, 2, 9})
    print("Why:")
    for name, reason in REASONS.items():
        print(fill(f"- {name}: {reason}", width=120, subsequent_indent="  "))
    print("\nTable 2 of the STA paper: VideoMAE, patches of 16, r tokens of a frame dropped at the first stage\n")
    rows = [["model", "r", "GFLOPs", "GMACs", "diff"]]
    for name, (sizes, published) in VIDEOMAE.items():
        for (r, gflops), gmacs in zip(published.items(), videomae_gmacs(sizes, list(published)), strict=True):
            rows.append([name, str(r), *beside(gflops, gmacs)])
    print_table(rows, texts={0})
    print("Norms are counted here as in that paper: 0.1 (S) to 0.7 (H). It rounds some figures and cuts others.")
    print("\nInTI-B 5,7 by part\n")
    parts = count_costs(InTIClipVisionConfig(**TOWERS["B/16"], num_labels=400)).items()
    rows = [[part, f"{cost.gmacs:.2f}", f"{cost.mparams:.2f}"] for part, cost in parts]
    print_table([["part", "GMACs", "M params"], *rows], texts={0})


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("costs", "methods"), help="What to compare.")
    parser.add_argument("arguments", nargs=REMAINDER, help="Of methods.")
    args = parser.parse_args()
    if args.command == "methods":
        from hf_inti.comparison.run import main as methods  # which needs much that costs does not

        return methods(args.arguments)
    if args.arguments:
        parser.error(f"costs takes no arguments, got {' '.join(args.arguments)}.")
    costs()
    return 0


if __name__ == "__main__":
    run_script(main)
