"""Print the demo's accuracies and draw its training curves; exit with status 1 if they are not as expected.

    python scripts/report_demo.py

Reads what scripts/train.py and scripts/evaluate.py wrote to demo/naive and demo/inti.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_inti.visualization import training_curves


# The eight classes form pairs that differ only in frame order, and the test set also holds each clip reversed, under
# the other class of its pair. A model that ignores order predicts one class for both, and is right for one at most.
MAX_WITHOUT_ORDER = 0.5
MIN_WITH_ORDER = 0.9


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    demo = Path("demo")
    results = {}
    for name in ("naive", "inti"):
        results[name] = json.loads((demo / name / "last" / "evaluation" / "results.json").read_text())
    curves = demo / "training.png"
    training_curves({name: demo / name / "metrics.jsonl" for name in results}, curves)
    naive, inti = (results[name]["top1"] for name in ("naive", "inti"))
    print(f"Training curves:  {curves}")
    print(f"Confusion matrix: {demo / 'inti' / 'last' / 'evaluation' / 'confusion_matrix.png'}")
    print(f"Naive, mean over frames:      {naive:6.1%} of {results['naive']['num_videos']} test clips")
    print(f"InTI, frames merged in order: {inti:6.1%} (classes differ only in frame order)")
    print(f"What InTI merged (InTI, Fig. 4): {demo / 'figure4.png'}")
    if naive > MAX_WITHOUT_ORDER or inti < MIN_WITH_ORDER:
        print(f"Expected at most {MAX_WITHOUT_ORDER:.0%} for Naive and at least {MIN_WITH_ORDER:.0%} for InTI.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
