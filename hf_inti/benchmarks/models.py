"""Models side by side: time of the forward pass or of a training step, multiply-adds, memory, share of the matrix rate.

A contestant is described by a mapping: `size` ("B/16" or "L/14") with the fields of `InTIClipVisionConfig` for a model
of this package, or `peer`, one of `PEERS`, for one of transformers or torchvision, which may have a `compression` with
`compression_options` (see `hf_inti.hosts`). All weights are random, in the published shapes.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    XCLIPConfig,
    XCLIPModel,
)

from ..hosts import compress
from ..hosts.torchvision_classifier import TorchvisionForVideoClassification, TorchvisionVideoConfig
from ..measure.costs import count_flops
from ..measure.jobs import Job, read_json, run_jobs, write_json
from ..measure.memory import held, peak, reset_peak
from ..measure.timing import TimingArguments, interleave, report, summary
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..papers.published import TOWERS
from ..training.cli import parse_recipe, run_script


CLASSES = 400
# Where outputs count as equal before they are timed, of logits of about 1: float32, and bfloat16 with its 8 bits.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PerFrame(nn.Module):
    """transformers' CLIP on every frame: pixels (B, T, C, height, width) -> the mean feature, classified."""

    def __init__(self, clip: CLIPVisionModel):
        super().__init__()
        self.clip, self.classifier = clip, nn.Linear(clip.config.hidden_size, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.clip(pixel_values.flatten(0, 1)).pooler_output.unflatten(0, pixel_values.shape[:2])
        return self.classifier(features.mean(1))


class VideoFeatures(nn.Module):
    """X-CLIP's video side alone: its tower with messages between frames, and the transformer over frames."""

    def __init__(self, xclip: XCLIPModel):
        super().__init__()
        self.xclip = xclip

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.xclip.get_video_features(pixel_values)
        return features if isinstance(features, torch.Tensor) else features.pooler_output


def _clip(attention: str) -> nn.Module:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPVisionConfig(**sizes, patch_size=16)
    return PerFrame(CLIPVisionModel._from_config(config, attn_implementation=attention))


def _xclip(attention: str) -> nn.Module:
    vision = {"patch_size": 16, "num_frames": 16, "mit_hidden_size": 512}
    config = XCLIPConfig(vision_config=vision)
    model = XCLIPModel._from_config(config, attn_implementation=attention)
    del model.text_model, model.text_projection, model.prompts_generator
    return VideoFeatures(model)


def _of(model_class: type[PreTrainedModel], config_class: type, **options) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        if not model_class._supports_sdpa:
            attention = "eager"
        return model_class._from_config(config_class(**options, num_labels=CLASSES), attn_implementation=attention)

    return build


def _torchvision(architecture: str) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        return TorchvisionForVideoClassification(TorchvisionVideoConfig(architecture=architecture, num_labels=CLASSES))

    return build


# V-JEPA 2 is published from ViT-L on; in the size of the others it takes seconds. The predictor does not run.
VJEPA2_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "pred_num_hidden_layers": 1}
VJEPA2_B |= {"crop_size": 224, "frames_per_clip": 16}

# name: (number of frames, the model with the attention that is asked for)
PEERS = {
    "clip_per_frame": (16, _clip),
    "xclip_b16": (16, _xclip),
    "timesformer_b": (16, _of(TimesformerForVideoClassification, TimesformerConfig, num_frames=16)),
    "vivit_b": (32, _of(VivitForVideoClassification, VivitConfig)),
    "videomae_b": (16, _of(VideoMAEForVideoClassification, VideoMAEConfig)),
    "vjepa2_b": (16, _of(VJEPA2ForVideoClassification, VJEPA2Config, **VJEPA2_B)),
    "mvit_v1_b": (16, _torchvision("mvit_v1_b")),
    "swin3d_t": (32, _torchvision("swin3d_t")),
}


@dataclass
class RunOptions:
    """How models are run: the settings of a benchmark that the process of each model needs."""

    mode: str = field(default="forward", metadata={"help": "forward, or training: forward, backward, optimiser."})
    precision: str = field(
        default="fp32", metadata={"help": "fp32, or bf16: weights in forward, autocast in training."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile every model."})
    optimize: bool = field(default=False, metadata={"help": "optimize_for_inference() on the models of this package."})
    matmul_precision: str = field(
        default="highest", metadata={"help": "torch's: highest; medium has CPUs use oneDNN, still in full float32."}
    )
    batch_size: int = field(default=1, metadata={"help": "Clips in a batch."})

    def __post_init__(self):
        for name, valid in (
            ("mode", ("forward", "training")),
            ("precision", tuple(DTYPES)),
            ("matmul_precision", ("highest", "high", "medium")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.mode == "training" and self.optimize:
            raise ValueError("optimize is for inference: take it away, or give --mode forward.")


@dataclass
class ModelsArguments(TimingArguments):
    """What models are compared, and what is measured of them."""

    models: dict | None = field(
        default=None,
        metadata={"help": "Names, each with {size, fields of the configuration} or {peer: name} (JSON here)."},
    )
    title: str = field(default="Models", metadata={"help": "Of the table."})
    memory: bool = field(default=False, metadata={"help": "Also the peak memory of each model, in its own process."})
    matrix_rate: bool = field(
        default=True,
        metadata={"help": "Also time the matrix products of the first model's blocks, for the machine's rate."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.models or not all(isinstance(spec, dict) for spec in self.models.values()):
            raise ValueError(f"models must map names to mappings, got {self.models!r}.")
        for name, spec in self.models.items():
            if re.search(r"[\s/<>|]", name):
                raise ValueError(f"a model's name has no spaces and none of / < > |, got {name!r}.")
            try:
                frames_and_size(spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def configuration(spec: dict) -> InTIClipVisionConfig:
    """The configuration of a model of this package. Raises ValueError for a size or field that does not exist."""
    spec = dict(spec)
    size = spec.pop("size", None)
    if not isinstance(size, str) or size not in TOWERS:
        raise ValueError(f"give a size, {' or '.join(TOWERS)}, or a peer, one of {', '.join(PEERS)}; got {size!r}.")
    try:
        return InTIClipVisionConfig(**{**TOWERS[size], "num_labels": CLASSES, **spec})
    except StrictDataclassError as error:  # a field of another type
        raise ValueError(" ".join(str(error).split())) from None


def frames_and_size(spec: dict) -> tuple[int, int]:
    """Frames of a clip, and their height and width in pixels."""
    if "peer" not in spec:
        config = configuration(spec)
        return config.num_frames, config.image_size
    others = spec.keys() - {"peer", "compression", "compression_options"}
    if not isinstance(spec["peer"], str) or spec["peer"] not in PEERS or others:
        raise ValueError(
            f"a peer is one of {', '.join(PEERS)} and has no other settings than compression and compression_options, "
            f"got {spec}."
        )
    return PEERS[spec["peer"]][0], 224


def build(spec: dict, attention: str = "sdpa") -> nn.Module:
    """The model, with weights from seed 0: two of the same shape have the same. Eager where it has no `attention`.

    Much of a new module starts at zero, and outputs would agree whatever it computed: all weights are moved a little.
    """
    torch.manual_seed(0)
    if "peer" in spec:
        model = PEERS[spec["peer"]][1](attention)
    else:
        model = InTIClipForVideoClassification._from_config(configuration(spec), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if "peer" in spec and "compression" in spec:
        compress(getattr(model, "host", model), spec["compression"], **spec.get("compression_options", {}))
    return model


def clips(spec: dict, batch_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    frames, size = frames_and_size(spec)
    return torch.randn(batch_size, frames, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def logits_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def count_macs(spec: dict) -> int:
    """Multiply-adds of one clip, attention's products counted, norms and activations not."""
    with torch.device("meta"):
        model = build(spec, "eager").eval().requires_grad_(False)  # the counter does not see inside fused kernels
        frames, size = frames_and_size(spec)
        pixel_values = torch.empty(1, frames, 3, size, size)
    return count_flops(model, pixel_values).get_total_flops() // 2


def runnable(spec: dict, how: RunOptions) -> Callable[[], torch.Tensor]:
    """The model and its input, prepared: what is timed. Returns logits, or in training the loss."""
    device = PartialState().device
    with device:  # a GPU draws the weights in a moment
        model = build(spec)
    pixel_values = clips(spec, how.batch_size, device)
    ours = isinstance(model, InTIClipForVideoClassification)
    if how.mode == "forward":
        model.eval().to(DTYPES[how.precision])
        pixel_values = pixel_values.to(DTYPES[how.precision])
        if how.optimize and ours:
            model.optimize_for_inference()
    if how.compile:
        # For the others, too, what InTIClipPreTrainedModel.compile sees to.
        model.compile(options={"layout_optimization": False})
    if how.mode == "forward":

        @torch.no_grad()
        def forward() -> torch.Tensor:
            return logits_of(model(pixel_values))

        return forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels = torch.randint(
        spec.get("num_labels", CLASSES), (how.batch_size,), generator=torch.Generator().manual_seed(0)
    ).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16) if how.precision == "bf16" else contextlib.nullcontext()
    model.train()

    def train() -> torch.Tensor:
        with autocast:
            loss = cross_entropy(logits_of(model(pixel_values)).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay where they are, apart from what a step takes more
        return loss.detach()

    return train


def check_outputs(name: str, spec: dict, how: RunOptions, run: Callable[[], torch.Tensor]) -> float:
    """The largest difference of the logits, in training of the first loss, from the plain model's in full float32.

    Raises ValueError where it is too large, or where logits are not (B, classes) and finite.
    """
    found = run().float()
    rows = how.batch_size if how.mode == "forward" else 1
    if found.numel() % rows or (found.dim() and len(found) != rows) or not found.isfinite().all():
        raise ValueError(f"{name} returns {tuple(found.shape)}, or numbers that are not finite; it is not timed.")
    plain = replace(how, precision="fp32", compile=False, optimize=False)
    torch.set_float32_matmul_precision("highest")
    expected = runnable(spec, plain)()
    torch.set_float32_matmul_precision(how.matmul_precision)
    difference = (found - expected).abs().max().item()
    if how.precision == "bf16" and "peer" in spec and "compression" in spec:
        return difference  # of nearly equal tokens others are kept
    if not difference <= TOLERANCES[how.precision]:
        raise ValueError(
            f"{name} differs by {difference:.2g} from the plain model in full float32, which is more than "
            f"{TOLERANCES[how.precision]}: it is not timed."
        )
    return difference


def linears(spec: dict, how: RunOptions) -> dict[str, tuple[int, Callable[[], object]]]:
    """The four matrix products of a block: multiply-adds, and what computes them on the tokens of one batch."""
    config, device, dtype = configuration(spec), PartialState().device, DTYPES[how.precision]
    D, wide = config.hidden_size, config.intermediate_size
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    rows = how.batch_size * config.num_frames * tokens
    products = {}
    for name, (width_in, width_out) in {"qkv": (D, 3 * D), "out": (D, D), "fc1": (D, wide), "fc2": (wide, D)}.items():
        layer = nn.Linear(width_in, width_out, device=device, dtype=dtype).requires_grad_(False)
        x = torch.randn(rows, width_in, device=device, dtype=dtype)
        products[name] = (rows * width_in * width_out, lambda layer=layer, x=x: layer(x))
    return products


def measure_memory(spec: dict, how: RunOptions) -> dict:
    """In a process of its own: what the model takes at most, and in training how much of it activations are.

    `peak_memory_bytes` is all, weights included (on a CPU: beyond what Python and torch take without a model);
    `activation_memory_bytes` is the peak of a training step beyond weights, gradients and the optimiser's state.
    """
    device = PartialState().device
    clips(spec, how.batch_size, device)
    before = held(device)
    run = runnable(spec, how)
    run()  # the optimiser's state, and whatever is set up once
    ready = held(device)
    if not reset_peak(device):
        return {}
    run()
    most = peak(device)
    if None in (before, ready, most):
        return {}
    activations = {"activation_memory_bytes": most - ready} if how.mode == "training" else {}
    return {"peak_memory_bytes": most - before, **activations}


def memory_of_all(models: dict[str, dict], how: RunOptions, folder: Path, threads: int) -> dict[str, dict]:
    """`measure_memory` of each, one process after the other."""
    jobs = []
    for name, spec in models.items():
        output = folder / f"memory_{len(jobs)}.json"
        output.unlink(missing_ok=True)
        settings = json.dumps({"spec": spec, "how": asdict(how)})
        arguments = ["hf_inti.benchmarks.models", settings, str(output)]
        jobs.append(Job(name, arguments, folder / "memory_log.txt", output))
    run_jobs(jobs, 1, threads, "Memory", lambda job, seconds: f"{job.name}: measured")
    found = {}
    for job in jobs:
        found[job.name] = read_json(job.output)
        job.output.unlink()
    return found


def measure_models(
    models: dict[str, dict], how: RunOptions, args: TimingArguments, matrix_rate: bool
) -> dict[str, dict]:
    """Rows of all models, and with `matrix_rate` the rate of the first own model's matrix products as well."""
    torch.set_float32_matmul_precision(how.matmul_precision)
    rows, runs = {}, {}
    for name, spec in models.items():
        runs[name] = runnable(spec, how)
        difference = check_outputs(name, spec, how, runs[name])
        macs = count_macs(spec)
        rows[name] = {"gmacs": macs / 1e9, "difference": difference}
    own = next((spec for spec in models.values() if "peer" not in spec), None)
    products = linears(own, how) if matrix_rate and own and how.mode == "forward" else {}
    times = interleave({**runs, **{f"matrix {n}": run for n, (_, run) in products.items()}}, args.repetitions)
    rates = [macs / summary(times[f"matrix {name}"])["seconds"] for name, (macs, _) in products.items()]
    for name, row in rows.items():
        row |= summary(times[name])
        row["clips_per_second"] = how.batch_size / row["seconds"]
        if rates:
            rate = math.exp(sum(map(math.log, rates)) / len(rates))  # the geometric mean
            row["matrix_gmacs_per_second"] = rate / 1e9
            row["matrix_fraction"] = 1e9 * row["gmacs"] * row["clips_per_second"] / rate
    return rows


def describe(how: RunOptions, rows: dict[str, dict]) -> str:
    """A sentence on how models were run."""
    what = {
        "forward": "Forward pass",
        "training": "Training step (forward, backward, AdamW)",
    }[how.mode]
    ways = [how.precision, f"matmul precision {how.matmul_precision}"]
    ways += [
        way for way, is_on in (("optimize_for_inference on ours", how.optimize), ("compiled", how.compile)) if is_on
    ]
    text = f"{what} of {how.batch_size} clip{'s' if how.batch_size > 1 else ''}, {', '.join(ways)}."
    text += " Multiply-adds are the plain model's; the difference is from it, in full float32."
    rates = [row["matrix_gmacs_per_second"] for row in rows.values() if "matrix_gmacs_per_second" in row]
    if rates:
        text += f" The matrix rate, the geometric mean of a block's four linear layers, is {2 * rates[0]:.0f} GFLOP/s."
    return text


def main(arguments: list[str]) -> int:
    """`benchmark.py models`. Raises ValueError for settings that do not fit and outputs that do not agree."""
    args, how = parse_recipe([ModelsArguments, RunOptions], arguments, description=__doc__)
    args.pin_threads()
    args.check_names(args.models)
    rows = measure_models(args.models, how, args, args.matrix_rate)
    if args.memory:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, found in memory_of_all(args.models, how, folder, torch.get_num_threads()).items():
            rows[name] |= found
    return report(args.title, rows, args, describe(how, rows), how.batch_size)


def _measure_memory(settings: str, output: str) -> None:
    settings = json.loads(settings)
    how = RunOptions(**settings["how"])
    torch.set_float32_matmul_precision(how.matmul_precision)
    write_json(Path(output), measure_memory(settings["spec"], how))


if __name__ == "__main__":  # as memory_of_all starts it
    run_script(lambda: _measure_memory(*sys.argv[1:]))
