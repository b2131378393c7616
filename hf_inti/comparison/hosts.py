"""Trained video models with fewer tokens, without training: accuracy against multiply-adds, on small models.

    python scripts/make_demo_data.py --output_dir outputs/hosts/data --task stills --num_train 300 --num_test 50
    python scripts/compare.py hosts --data_dir outputs/hosts/data --work_dir outputs/hosts

Trains a small model of each host from random weights, all under one recipe, and evaluates it as it is and in the ways
of `HOSTS`. Interrupted, the same command continues: each evaluation leaves a record in output_dir.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, TimesformerConfig, VideoMAEConfig, VivitConfig, VJEPA2Config

from ..data.clips import VideoClips
from ..data.datasets import align_labels, load_video_dataset
from ..hosts.torchvision_classifier import TorchvisionVideoConfig
from ..measure.costs import count_flops
from ..measure.jobs import ROOT, Job, read_json, run_jobs, write_json
from ..measure.records import provenance, source_line
from ..measure.tables import markdown_table
from ..training.checkpoints import CompressionOverride, load_classifier
from ..training.cli import flags_of, parse_arguments
from ..training.evaluation import EvalTransform, evaluate_loader, evaluation_loader
from .run import describe_folder


FRAMES, SIDE = 16, 32
RECIPE = {
    "cache_frames": True, "resize": SIDE, "crop": "center", "batch_size": 32, "eval_batch_size": 50,
    "learning_rate": 1e-3, "weight_decay": 0.05, "max_grad_norm": 1.0, "warmup_epochs": 1, "log_every_steps": 25,
}  # fmt: skip
VIT = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
MLP = {"intermediate_size": 384}
MVIT = {  # MViTv1: a stage of two blocks, then one of two on a quarter of the places
    "block_setting": [
        [1, 32, 32, [], [3, 3, 3], [], [1, 4, 4]],
        [1, 32, 64, [], [3, 3, 3], [], [1, 4, 4]],
        [2, 64, 64, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]],
        [2, 64, 64, [], [3, 3, 3], [], [1, 2, 2]],
    ],
    "residual_pool": False, "residual_with_cls_embed": False, "rel_pos_embed": False, "proj_after_attn": False,
    "dropout": 0.0,
}  # fmt: skip
SWIN = {
    "patch_size": [2, 4, 4], "embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4, 4],
    "stochastic_depth_prob": 0.0,
}  # fmt: skip


class Setting(NamedTuple):
    """A way to evaluate a model."""

    method: str
    value: str
    compression: str = "none"
    options: dict | None = None
    num_frames: int | None = None

    @property
    def file(self) -> str:
        return f"{self.method}_{self.value}.json".replace(" ", "_")


class SmallHost(NamedTuple):
    package: str
    config: Callable[[], PreTrainedConfig]
    settings: list[Setting]


def _sweep(method: str, compression: str, values: list, option: Callable[[object], dict], name: str) -> list[Setting]:
    return [Setting(method, f"{name} {value}", compression, option(value)) for value in values]


def _sta(values: list[int], of: Callable[[int], object] = int) -> list[Setting]:
    """STA, and as many tokens dropped at random."""
    return [
        *_sweep("STA", "sta", values, lambda r: {"r": of(r)}, "r"),
        *_sweep("random tokens", "sta", values, lambda r: {"r": of(r), "scores": "random"}, "r"),
    ]


def _tome(values: list[int]) -> list[Setting]:
    return _sweep("ToMe", "tome", values, lambda r: {"r": r}, "r")


def _fewer(counts: list[int]) -> list[Setting]:
    return [Setting("fewer frames", f"{n} frames", num_frames=n) for n in counts]


def _stts(choice: str) -> list[Setting]:
    """What STTS's paper compares with and needs no training."""
    shares = [0.75, 0.5, 0.25]
    options = {"choice": choice, "spatial": []}
    return _sweep(f"frames: {choice}", "stts", shares, lambda share: {"temporal": [[1, share]], **options}, "share")


ALL = Setting("all kept", "as trained")
JOINT = [*_sta([2, 4, 6, 8]), *_tome([8, 16, 24, 32]), *_fewer([12, 8, 4])]
# Joint attention: 8 x 16 tokens. TimeSformer: of 8 frames, each of 16 tokens. The two of torchvision: 8 x 64 at first.
HOSTS = {
    "VideoMAE": SmallHost(
        "transformers", lambda: VideoMAEConfig(image_size=SIDE, patch_size=8, num_frames=FRAMES, **VIT, **MLP), JOINT
    ),
    "ViViT": SmallHost(
        "transformers",
        lambda: VivitConfig(image_size=SIDE, tubelet_size=[2, 8, 8], num_frames=FRAMES, **VIT, **MLP),
        JOINT,
    ),
    "V-JEPA 2": SmallHost(
        "transformers",
        lambda: VJEPA2Config(
            crop_size=SIDE, patch_size=8, frames_per_clip=FRAMES, num_pooler_layers=1, pred_hidden_size=12,
            pred_num_attention_heads=2, pred_num_hidden_layers=1, **VIT,
        ),
        JOINT,
    ),
    "TimeSformer": SmallHost(
        "transformers",
        lambda: TimesformerConfig(image_size=SIDE, patch_size=8, num_frames=FRAMES // 2, **VIT, **MLP),
        [*_tome([1, 2, 3, 4]), *_fewer([6, 4, 2])],
    ),
    "VideoSwin": SmallHost(
        "torchvision",
        lambda: TorchvisionVideoConfig(
            architecture="SwinTransformer3d", options=SWIN, num_frames=FRAMES, image_size=SIDE
        ),
        [*_sta([4, 8, 12], lambda r: [r, 0, 0]), *_fewer([12, 8, 4])],
    ),
    "MViT": SmallHost(
        "torchvision",
        lambda: TorchvisionVideoConfig(architecture="MViT", options=MVIT, num_frames=FRAMES, image_size=SIDE),
        [*_stts("random"), *_stts("attention"), *_fewer([12, 8, 4])],
    ),
}  # fmt: skip


@dataclass
class HostsArguments:
    data_dir: str = field(metadata={"help": "The demo's clips, or other class folders with train/ and test/."})
    output_dir: str = field(default="results/hosts", metadata={"help": "Gets records, hosts.json and hosts.md."})
    work_dir: str = field(default="outputs/hosts", metadata={"help": "Gets the trained models."})
    hosts: list[str] = field(default_factory=lambda: list(HOSTS), metadata={"help": "Which models."})
    epochs: int = field(default=6, metadata={"help": "Of training."})
    seed: int = field(default=0, metadata={"help": "Of the weights and the order of clips."})
    threads: int = field(default=1, metadata={"help": "Of the processor."})

    def __post_init__(self):
        for name in self.hosts:
            if name not in HOSTS:
                raise ValueError(f"hosts must be among {', '.join(HOSTS)}, got {name!r}.")
        if self.epochs < 1 or self.threads < 1:
            raise ValueError(f"epochs and threads must be at least 1, got {self.epochs} and {self.threads}.")

    @property
    def training(self) -> dict:
        """The settings that decide how a model is trained."""
        return {**RECIPE, "epochs": self.epochs, "seed": self.seed}


def main(arguments: list[str]) -> int:
    """`compare.py hosts`. Raises ValueError for records of another run."""
    args = parse_arguments(HostsArguments, [], __doc__, arguments)
    torch.set_num_threads(args.threads)
    for name in args.hosts:
        if not importable(HOSTS[name].package):
            print(f"{name} is left out: {HOSTS[name].package} cannot be imported.")
            continue
        train(name, args)
        for setting in (ALL, *HOSTS[name].settings):
            measure(name, setting, args)
    write_report(args)
    return 0


def importable(package: str) -> bool:
    try:
        import_module(f"{package}.models")
    except (ImportError, RuntimeError):  # torchvision's operators may not fit this torch
        return False
    return True


def train(name: str, args: HostsArguments) -> None:
    """Train the model of a host, unless it is; the folder is `work_dir`/NAME/last."""
    folder = Path(args.work_dir) / name.replace(" ", "_")
    host = HOSTS[name]
    host.config().save_pretrained(folder / "untrained")
    last = {"eval_every_epochs": args.epochs, "checkpoint_every_epochs": 2}
    places = {"host": f"{host.package}/{folder / 'untrained'}", "train_dir": args.data_dir, "eval_dir": args.data_dir}
    flags = flags_of({**args.training, **last, **places, "output_dir": folder})
    command = [str(ROOT / "scripts" / "train.py"), *flags, "--resume"]
    job = Job(name, command, folder / "log.txt", folder / "last" / "config.json")
    run_jobs([job], 1, args.threads, "Training", lambda job, seconds: f"{name}: trained in {seconds:.0f} s")


def measure(name: str, setting: Setting, args: HostsArguments) -> None:
    """Evaluate a trained model in one way, unless there is a record of it."""
    path = Path(args.output_dir) / name.replace(" ", "_") / setting.file
    run = {"training": args.training, "data": describe_folder(Path(args.data_dir), contents=False)}
    known = read_json(path)
    if known is not None:
        for part, value in json.loads(json.dumps(run)).items():
            if known[part] != value:
                raise ValueError(
                    f"{part} must be {known[part]} as in {path}, got {value}; give that, or another output_dir and "
                    "work_dir."
                )
        return
    override = CompressionOverride(setting.compression, None, setting.options)
    checkpoint = str(Path(args.work_dir) / name.replace(" ", "_") / "last")
    model, processor = load_classifier(checkpoint, override, setting.num_frames)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    dataset = align_labels(load_video_dataset(args.data_dir, split="test"), labels)
    accelerator = Accelerator()
    clips = VideoClips(dataset, EvalTransform(processor), on_bad_video="keep")
    metrics, _, _ = evaluate_loader(
        accelerator.prepare_model(model, evaluation_mode=True), evaluation_loader(clips, accelerator, 50), accelerator
    )
    if not hasattr(model, "host"):
        model.set_attn_implementation("eager")  # whose products the counter sees
    clip = torch.zeros(1, processor.num_frames, 3, SIDE, SIDE, device=accelerator.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = {name: metrics[name] for name in ("top1", "num_videos", "num_unreadable")}
    counts["gmacs"] = count_flops(model, clip).get_total_flops() / 2e9
    write_json(path, {"host": name, **setting._asdict(), **counts, **run, **provenance()})


def write_report(args: HostsArguments) -> None:
    """Write hosts.json and hosts.md of all records there are, and print the table."""
    folder, lines, records = Path(args.output_dir), [], []
    for name, host in HOSTS.items():
        place = folder / name.replace(" ", "_")
        whole = read_json(place / ALL.file)
        if whole is None:
            continue
        records.append(whole)
        for method in dict.fromkeys(setting.method for setting in host.settings):
            found = [read_json(place / s.file) for s in host.settings if s.method == method]
            records += filter(None, found)
            cells = [
                f"{100 * r['top1']:.1f} ({r['value']}: {r['gmacs'] / whole['gmacs']:.2f})" if r else "-" for r in found
            ]
            lines.append([name, method, f"{100 * whole['top1']:.1f}", *cells, *["-"] * (4 - len(cells))])
    heads = ["model", "method", "all kept", "a little fewer", "fewer", "fewer still", "fewest"]
    source = provenance()
    text = markdown_table(heads, lines, left=range(7))
    clips = records[0]["num_videos"] if records else 0
    text += f"\nTop-1 in % of {clips} test clips of eight classes, in brackets the setting and the share of the whole"
    text += f" model's multiply-adds; one training of each model.\n\n{source_line(source)}\n"
    (folder / "hosts.md").write_text(text)
    write_json(folder / "hosts.json", {**source, "records": records})
    print(text)
