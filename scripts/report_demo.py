"""Print what the demo showed, draw its training curves, and exit with 1 if it did not show it.

    python scripts/report_demo.py

Reads demo/naive and demo/inti, where scripts/train.py and scripts/evaluate.py wrote.
"""

import json
import sys
from pathlib import Path

from hf_inti.visualization import training_curves


# The eight classes are pairs that only the order of frames tells apart, and each test clip is there backwards too,
# under its pair's other name: who ignores order gives both the same name and is right about half of them at most.
MOST_WITHOUT_ORDER = 0.5
LEAST_WITH_ORDER = 0.9


def main() -> int:
    demo = Path("demo")
    results = {}
    for name in ("naive", "inti"):
        results[name] = json.loads((demo / name / "last" / "evaluation" / "results.json").read_text())
    curves = demo / "training.png"
    training_curves({name: demo / name / "metrics.jsonl" for name in results}, curves)
    naive, inti = (results[name]["top1"] for name in ("naive", "inti"))
    print(f"Training curves:  {curves}")
    print(f"Confusion matrix: {demo / 'inti' / 'last' / 'evaluation' / 'confusion_matrix.png'}")
    print(f"Naive, the mean over frames:  {naive:6.1%} of {results['naive']['num_videos']} test clips")
    print(f"InTI, frames merged in order: {inti:6.1%} (classes differ in the order of frames alone)")
    print(f"What InTI merged, as the paper's Figure 4: {demo / 'figure4.png'}")
    if naive > MOST_WITHOUT_ORDER or inti < LEAST_WITH_ORDER:
        print(
            f"This should be at most {MOST_WITHOUT_ORDER:.0%} for Naive and at least {LEAST_WITH_ORDER:.0%} for InTI."
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
