"""Compare methods.

    python scripts/compare.py costs

`costs` prints multiply-adds and parameters of the papers' models beside the published figures, counted on the meta
device: 16 frames of 224 x 224, one clip, 400 classes.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from hf_inti import InTIClipVisionConfig
from hf_inti.costs import count_costs


VIT_B16 = {"patch_size": 16}
VIT_L14 = {
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
CUBES = ("local_mhra", "dwconv")
# (tower, name in the paper, positions, published GFLOPs): Table 1, and the row of Table 4 without its temporal modules,
# whose cost the paper does not give.
TABLE_1 = [
    ("ViT-B/16", "Naive", None, 281),
    ("ViT-B/16", "InTI 3,5", [3, 5], 147),
    ("ViT-B/16", "InTI 5,7", [5, 7], 182),
    ("ViT-B/16", "InTI 7,9", [7, 9], 217),
    ("ViT-L/14", "Naive", None, 1297),
    ("ViT-L/14", "InTI 3,5", [6, 10], 650),
    ("ViT-L/14", "InTI 5,7", [10, 14], 811),
    ("ViT-L/14", "InTI 6,7 (Table 4)", [12, 14], None),
    ("ViT-L/14", "InTI 7,9", [14, 18], 973),
]
NOTES = """
GMACs: multiply-adds, which the paper calls FLOPs; norms, activations, softmax and the weighted sums are not counted.
- local_mhra, the default, reads F_cube as UniFormerV2's local unit, twice, and lies within 0.5 of every published InTI
  row. dwconv is Eq. 10 to the letter, one depth-wise 3x3x3 convolution: the published rows lie about 7 (B) and 17 (L)
  GMACs above it, so the authors' F_cube is not this one layer.
- ViT-L/14 Naive: 1296.2 counted, 1297 printed; with norms and the like (about 1.1 at 16 frames) it is 1297.3.
- Table 4 names InTI 6,7 with temporal modules but gives latencies and no GFLOPs: ours is without those modules.
- Parameters: the paper gives InTI-B with temporal modules 126 M (Table 2) and counts 118 for tokens alone, 121 with
  cube, 121 with frame, 121 with global (Table 5a). Ours, on top of UniFormerV2's 114.55: 118.1, 121.3, 120.5 and 118.1,
  together 123.7. Appendix B has only depth-wise convolutions in the global branch, so the published ones hold
  2 C^2 per module that it does not describe: they are not here. Nor do the published 378 M of ViT-L follow from either.
"""


def costs() -> None:
    """Print Table 1 of the InTI paper beside our counts."""
    heads = ["tower", "model", "published"]
    for cube in CUBES:
        heads += [f"{cube} GMACs", "difference", "M params"]
    rows = [heads]
    for tower, name, layers, published in TABLE_1:
        row = [tower, name, "-" if published is None else str(published)]
        sizes = VIT_B16 if tower == "ViT-B/16" else VIT_L14
        for cube in CUBES:
            options = {"compression": "none"}
            if layers is not None:
                options = {"compression_layers": layers, "compression_options": {"cube": cube}}
            total = count_costs(InTIClipVisionConfig(**sizes, **options, num_labels=400))["total"]
            difference = "-" if published is None else f"{total.gmacs - published:+.1f}"
            row += [f"{total.gmacs:.1f}", difference, f"{total.mparams:.1f}"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for n, row in enumerate(rows):
        cells = [cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        print("| " + " | ".join(cells) + " |")
        if n == 0:
            print("|" + "|".join("-" * (width + 1) + ("-" if i < 2 else ":") for i, width in enumerate(widths)) + "|")
    config = InTIClipVisionConfig(**VIT_B16, num_labels=400)
    print("\nInTI-B 5,7 by part:")
    for part, cost in count_costs(config).items():
        print(f"  {part:<16} {cost.gmacs:8.2f} GMACs  {cost.mparams:7.2f} M parameters")
    print(NOTES)


COMMANDS = {"costs": costs}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, help="What to compare.")
    COMMANDS[parser.parse_args().command]()
