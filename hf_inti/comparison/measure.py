"""Speed, memory, multiply-adds and parameters of a trained model, measured in a process that does nothing else."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from ..measure.costs import count_costs
from ..measure.jobs import write_json
from ..measure.memory import held, peak, reset_peak
from ..measure.records import conditions
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..training.arguments import TrainingArguments
from ..training.cli import run_script
from ..training.setup import build_optimizer
from ..training.weights import load_weights


WARM_UP = 3  # repetitions that do not count
REPETITIONS = (5, 40)  # at least, and at most
SECONDS = 10.0  # after which no more are begun, beyond the least


def counts_of(model: InTIClipForVideoClassification) -> dict:
    """What does not depend on the machine: `gmacs` of one clip, `parameters` and `trained_parameters`."""
    return {
        "gmacs": count_costs(model.config)["total"].gmacs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def measure(folder: Path, batch_size: int) -> dict:
    """Measure a model that train.py saved, on random clips of its shape, in the recipe's precision.

    Returns `conditions`, what `counts_of` returns, medians of
    `forward_clips_per_second` (evaluation, no gradients) and `training_clips_per_second` (forward, backward and the
    optimiser's step), and `peak_memory_bytes` of training: on CUDA all that was allocated, on a CPU what the process
    took more than it had with the model loaded (None where the system does not tell).
    """
    arguments = json.loads((folder / "run.json").read_text())["arguments"]
    training = TrainingArguments(**arguments["TrainingArguments"])
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    model = load_weights(InTIClipForVideoClassification, folder)
    if arguments["ModelArguments"]["activation_checkpointing"]:
        model.activation_checkpointing_enable()
    config = model.config
    counts = counts_of(model)
    torch.manual_seed(0)
    clips = torch.randn(batch_size, config.num_frames, config.num_channels, config.image_size, config.image_size)
    labels = torch.randint(config.num_labels, (batch_size,))
    optimizer, _ = build_optimizer(model, training, steps_per_epoch=1, total_steps=1)
    model, optimizer = accelerator.prepare(model, optimizer)
    clips, labels = clips.to(device), labels.to(device)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(pixel_values=clips)

    def train() -> None:
        model.train()
        accelerator.backward(cross_entropy(model(pixel_values=clips).logits.float(), labels))
        optimizer.step()
        optimizer.zero_grad()

    def seconds(step) -> float:
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    reset_peak(device)  # so far it is that of loading
    loaded = held(device)
    for _ in range(WARM_UP):
        forward()
        train()
    times: dict[str, list[float]] = {"forward": [], "training": []}
    fewest, many = REPETITIONS
    end = time.perf_counter() + SECONDS
    while len(times["forward"]) < fewest or (len(times["forward"]) < many and time.perf_counter() < end):
        times["forward"].append(seconds(forward))  # in turns, so that both meet the same disturbances
        times["training"].append(seconds(train))
    most = peak(device)
    if not cuda:  # beyond what Python and torch take
        most = None if None in (loaded, most) else most - loaded
    return {
        "conditions": conditions(batch_size, torch.get_num_threads()),
        **counts,
        **{f"{name}_clips_per_second": batch_size / median(values) for name, values in times.items()},
        "peak_memory_bytes": most,
    }


if __name__ == "__main__":  # as run.py starts it
    model, clips_in_batch, output = sys.argv[1:]
    run_script(lambda: write_json(Path(output), measure(Path(model), int(clips_in_batch))))
