"""Report what the demo showed, and exit with 1 if it did not show it.

    python scripts/report_demo.py --seed 0 [--record results/demo.json]

Reads demo/naive and demo/inti, written by scripts/train.py and scripts/evaluate.py. Prints the accuracies, draws the
training curves, and adds the seed's accuracies to the record, a JSON file with a table beside it (.md).
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from hf_inti.measure.jobs import read_json, write_json
from hf_inti.measure.records import provenance, source_line
from hf_inti.measure.tables import markdown_table
from hf_inti.visualization import training_curves


# The eight classes form pairs that only the order of frames tells apart, and every test clip is there backwards too,
# under its pair's other label: without order, a model gives both the same label and is right about at most half.
MAX_WITHOUT_ORDER = 0.5
MIN_WITH_ORDER = 0.9


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="0", help="The demo's SEED.")
    parser.add_argument(
        "--record", type=Path, default=Path("demo/demo.json"), help="Record that this seed is added to."
    )
    args = parser.parse_args()
    demo = Path("demo")
    results = {}
    for name in ("naive", "inti"):
        results[name] = json.loads((demo / name / "last" / "evaluation" / "results.json").read_text())
    curves = demo / "training.png"
    training_curves({name: demo / name / "metrics.jsonl" for name in results}, curves)
    naive, inti = (results[name]["top1"] for name in ("naive", "inti"))
    write_record(args.record, args.seed, {"Naive": naive, "InTI": inti}, results["inti"]["num_videos"])
    print(f"Training curves:  {curves}")
    print(f"Confusion matrix: {demo / 'inti' / 'last' / 'evaluation' / 'confusion_matrix.png'}")
    print(f"Naive, the mean over frames:  {naive:6.1%} of {results['naive']['num_videos']} test clips")
    print(f"InTI, frames merged in order: {inti:6.1%} (classes differ in the order of frames alone)")
    print(f"What InTI merged, as the paper's Figure 4: {demo / 'figure4.png'}")
    if naive > MAX_WITHOUT_ORDER or inti < MIN_WITH_ORDER:
        print(f"Naive must be at most {MAX_WITHOUT_ORDER:.0%} and InTI at least {MIN_WITH_ORDER:.0%}.")
        return 1
    return 0


def write_record(path: Path, seed: str, top1: dict[str, float], num_videos: int) -> None:
    """Add a seed's accuracies by model to the record of the seeds so far, and write its table."""
    seeds = (read_json(path) or {"seeds": {}})["seeds"]
    seeds[seed] = {"top1": top1, "num_videos": num_videos, **provenance()}
    seeds = dict(sorted(seeds.items()))
    record = {**provenance(), "command": f"make demo SEED={seed} RECORD={path}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**record, "seeds": seeds})
    lines = [[name, *(f"{each['top1'][name]:.1%}" for each in seeds.values())] for name in top1]
    table = markdown_table(["top-1", *(f"SEED={seed}" for seed in seeds)], lines)
    path.with_suffix(".md").write_text(f"{table}\n{source_line(record)}\n")


if __name__ == "__main__":
    sys.exit(main())
