"""A model in torch, optimised for inference, and as the files of scripts/export.py, side by side on the CPU."""

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from ..export import ExportedModel, check_exported, export_onnx, export_program, file_size, needs, quantize_onnx
from ..measure.timing import TimingArguments, interleave, report, summary
from ..training.cli import parse_recipe
from .models import build, clips, configuration, count_macs


@dataclass
class ExportBenchmarkArguments(TimingArguments):
    """Which model is exported, and how torch is run beside it."""

    model: dict | None = field(
        default=None, metadata={"help": "{size, fields of the configuration} (JSON here); its weights are random."}
    )
    batch_size: int = field(default=1, metadata={"help": "Clips in a batch."})
    matmul_precision: str = field(
        default="medium", metadata={"help": "torch's: highest; medium has CPUs use oneDNN, still in full float32."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise ValueError("model must be a mapping of size and fields of the configuration, got nothing.")
        configuration(self.model)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")


def main(arguments: list[str]) -> int:
    """`benchmark.py export`. Raises ValueError where a file does not compute what the model computes."""
    (args,) = parse_recipe([ExportBenchmarkArguments], arguments, description=__doc__)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needs(package)
    PartialState(cpu=True)  # files are run there
    args.pin_threads()
    args.check_names(["torch", "torch_optimized", "torch_program", "onnx", "onnx_int8"])
    torch.set_float32_matmul_precision(args.matmul_precision)
    threads = torch.get_num_threads()
    model = build(args.model).eval()
    pixel_values = clips(args.model, args.batch_size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        onnx, int8, program = (Path(folder) / name for name in ("model.onnx", "model_int8.onnx", "model.pt2"))
        export_onnx(model, onnx)
        export_program(model, program)
        for path in (onnx, program):
            check_exported(model, path)
        quantize_onnx(onnx, int8)
        runs = {
            "torch": model,
            "torch_optimized": copy.deepcopy(model).optimize_for_inference(),
            "torch_program": ExportedModel(program),
            "onnx": ExportedModel(onnx, threads),
            "onnx_int8": ExportedModel(int8, threads),
        }
        expected = model(pixel_values).logits
        rows = {}
        for name, run in runs.items():
            difference = (run(pixel_values).logits - expected).abs().max().item()
            rows[name] = {"gmacs": count_macs(args.model) / 1e9, "difference": difference}
        for name, path in (("torch_program", program), ("onnx", onnx), ("onnx_int8", int8)):
            rows[name]["file_bytes"] = file_size(path)
        times = interleave({name: lambda run=run: run(pixel_values) for name, run in runs.items()}, args.repetitions)
    for name, row in rows.items():
        row |= summary(times[name])
        row["clips_per_second"] = args.batch_size / row["seconds"]
    about = (
        f"Forward pass of {args.batch_size} clip{'s' if args.batch_size > 1 else ''}, fp32 but for int8's weights, "
        f"torch's matmul precision {args.matmul_precision}. The difference is that of random logits from torch's."
    )
    return report("Exported models", rows, args, about, args.batch_size)
