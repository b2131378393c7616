"""Measure speed and memory, side by side.

    python scripts/benchmark.py models scripts/benchmarks/naive_b16.yaml --require "seconds inti / naive <= 0.7"
    python scripts/benchmark.py COMMAND --help

    models      forward pass or training step of models of this package and of transformers
    growth      time and memory against frames, resolution and batch size
    decoding    videos to tensors, beside other decoders
    prediction  scripts/predict.py on many videos, beside decoding alone and the model alone
    bulk        the stages of scripts/bulk.py together, beside each alone
    export      ONNX Runtime and torch.export beside torch

Every command takes a YAML file, flags or both, leaves a table (Markdown), all numbers (JSON) and a picture in
--output_dir, and ends with an error where a --require is missed.
"""

from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module

from transformers.utils.logging import disable_progress_bar

from hf_inti.training.cli import run_script


COMMANDS = {
    "models": "benchmarks.models",
    "growth": "benchmarks.growth",
    "decoding": "benchmarks.decoding",
    "prediction": "benchmarks.prediction",
    "bulk": "benchmarks.bulk",
    "export": "benchmarks.export",
}


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, help="What to measure.")
    parser.add_argument("arguments", nargs=REMAINDER, help="[CONFIG.yaml] --flags of that command.")
    args = parser.parse_args()
    disable_progress_bar()  # of loading weights, beside ours
    return import_module(f"hf_inti.{COMMANDS[args.command]}").main(args.arguments)


if __name__ == "__main__":
    run_script(main)
