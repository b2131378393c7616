"""How time and memory grow with the frames of a clip, the resolution of a frame and the clips in a batch."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..measure.timing import TimingArguments, report
from ..model.methods import check_frames
from ..training.cli import parse_recipe
from .models import RunOptions, configuration, describe, measure_models, memory_of_all


AXES = {"frames": "frames of a clip", "resolution": "pixels of a side", "batch": "clips in a batch"}


@dataclass
class GrowthArguments(TimingArguments):
    """Which models grow, and how far. What does not grow is the models' own and one clip."""

    models: dict | None = field(
        default=None, metadata={"help": "Names, each with {size, fields of the configuration} (JSON here)."}
    )
    frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64], metadata={"help": "Frames of a clip."})
    resolution: list[int] = field(default_factory=lambda: [224, 336], metadata={"help": "Pixels of a frame's side."})
    batch: list[int] = field(default_factory=lambda: [1, 2, 8, 32], metadata={"help": "Clips in a batch."})
    memory: bool = field(default=True, metadata={"help": "Also the peak memory of each, in a process of its own."})

    def __post_init__(self):
        super().__post_init__()
        if not self.models or any("peer" in spec for spec in self.models.values()):
            raise ValueError(f"models must map names to mappings of size and fields, got {self.models!r}.")
        for axis in AXES:
            points = getattr(self, axis)
            if not points or sorted(set(points)) != points or points[0] < 1:
                raise ValueError(f"{axis} must be ascending whole numbers from 1, at least one, got {points}.")
        for point in points_of(self):
            for spec in point[2].values():
                config = configuration(spec)  # what does not fit shows here
                check_frames(config.num_frames, config.frame_multiple)


def points_of(args: GrowthArguments) -> list[tuple[str, int, dict[str, dict], int]]:
    """All that is measured: (axis, value, models, clips in a batch)."""
    fields = {"frames": "num_frames", "resolution": "image_size"}
    points = []
    for axis in AXES:
        for value in getattr(args, axis):
            more = {fields[axis]: value} if axis in fields else {}
            models = {name: {**spec, **more} for name, spec in args.models.items()}
            points.append((axis, value, models, value if axis == "batch" else 1))
    return points


def name_of(model: str, axis: str, value: int) -> str:
    """The name of a row."""
    return f"{model}:{axis}={value}"


def picture(rows: dict[str, dict], args: GrowthArguments, path: Path) -> None:
    """Draw time and memory along each axis; dashed, what the first point and the operations predict."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    panels = figure.subplots(2, len(AXES))
    for column, (axis, label) in enumerate(AXES.items()):
        values = getattr(args, axis)
        for model in args.models:
            found = [rows[name_of(model, axis, value)] for value in values]
            seconds = [row["seconds"] for row in found]
            line = panels[0, column].plot(values, seconds, marker="o", label=model)[0]
            operations = [
                row["gmacs"] * (value if axis == "batch" else 1) for row, value in zip(found, values, strict=True)
            ]
            expected = [seconds[0] * n / operations[0] for n in operations]
            panels[0, column].plot(values, expected, linestyle="--", linewidth=1, color=line.get_color())
            memory = [row.get("peak_memory_bytes") for row in found]
            if None not in memory:
                panels[1, column].plot(values, [m / 1e9 for m in memory], marker="o", label=model)
        for row, unit in enumerate(("s", "peak memory, GB")):
            panels[row, column].set(xlabel=label, ylabel=unit, ylim=(0, None), xticks=values)
            panels[row, column].grid(alpha=0.3)
    panels[0, 0].legend()
    figure.suptitle("Dashed: as the multiply-adds grow")
    figure.savefig(path)


def main(arguments: list[str]) -> int:
    """`benchmark.py growth`. Raises ValueError for settings that do not fit."""
    args, how = parse_recipe([GrowthArguments, RunOptions], arguments, description=__doc__)
    if how.batch_size != 1:
        raise ValueError(f"the clips in a batch are what grows: give --batch {how.batch_size} and not --batch_size.")
    args.pin_threads()
    args.check_names([name_of(model, axis, value) for axis, value, models, _ in points_of(args) for model in models])
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for axis, value, models, batch_size in points_of(args):
        of_point = replace(how, batch_size=batch_size)
        found = measure_models(models, of_point, args, matrix_rate=False)
        memory = memory_of_all(models, of_point, folder, torch.get_num_threads()) if args.memory else {}
        for name, row in found.items():
            row["gmacs_per_second"] = row["gmacs"] * row["clips_per_second"]
            rows[name_of(name, axis, value)] = row | memory.get(name, {})
    picture(rows, args, folder / "benchmark.png")
    about = describe(how, rows).replace("of 1 clip", "of one clip where the batch does not grow")
    return report("Growth", rows, args, about, how.batch_size, picture=False)
