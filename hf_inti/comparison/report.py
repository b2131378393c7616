"""The comparison of methods as a table (Markdown and CSV) and as a picture of accuracy against multiply-adds."""

import csv
from pathlib import Path
from statistics import mean, stdev

from ..measure.jobs import write_json
from ..measure.records import provenance, source_line
from ..measure.tables import markdown_table


HEADS = ["method", "top-1 %", "GMACs", "M params", "M trained", "forward clips/s", "training clips/s", "peak memory MB"]


def write_report(
    results: dict[str, list[dict]], measurements: dict[str, dict], seeds: list[int], about: str, folder: Path
) -> str:
    """Write comparison.json, .csv, .md and .png into `folder`.

    Args:
        results: of each method the last evaluation of each seed, with `eval_top1` in [0, 1].
        measurements: of each method what `measure` returns.
        seeds: in the order of `results`.
        about: what was trained on what, for the line below the table.

    Returns the text of comparison.md.
    """
    rows = []
    for method, of_seeds in results.items():
        top1 = [result["eval_top1"] for result in of_seeds]
        numbers = {name: value for name, value in measurements[method].items() if name != "conditions"}
        spread = stdev(top1) if len(top1) > 1 else None  # one seed has no spread
        rows.append({"method": method, "top1": mean(top1), "top1_std": spread, "top1_of_seeds": top1, **numbers})
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "top1_of_seeds": " ".join(map(str, row["top1_of_seeds"]))} for row in rows)
    conditions, record = [m["conditions"] for m in measurements.values()], provenance()
    text = f"{markdown(rows)}\n{notes(conditions, seeds, about)}\n{source_line(record)}\n"
    (folder / "comparison.md").write_text(text)
    result = {"about": about, "seeds": seeds, **record, "conditions": conditions[0], "rows": rows}
    write_json(folder / "comparison.json", result)
    accuracy_picture(rows, folder / "comparison.png")
    return text


def markdown(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        accuracy = f"{100 * row['top1']:.1f}"
        if row["top1_std"] is not None:
            accuracy += f" ± {100 * row['top1_std']:.1f}"
        memory = row["peak_memory_bytes"]
        lines.append(
            [
                row["method"],
                accuracy,
                f"{row['gmacs']:.4g}",
                f"{row['parameters'] / 1e6:.3g}",
                f"{row['trained_parameters'] / 1e6:.3g}",
                f"{row['forward_clips_per_second']:.4g}",
                f"{row['training_clips_per_second']:.4g}",
                "-" if memory is None else f"{memory / 1e6:.0f}",
            ]
        )
    return markdown_table(HEADS, lines)


def notes(conditions: list[dict], seeds: list[int], about: str) -> str:
    first = conditions[0]
    sizes = sorted({c["batch_size"] for c in conditions})
    memory = "all that was allocated" if first["device"].startswith("cuda") else "what it takes beyond the loaded model"
    return (
        f"{about}.\n"
        f"Top-1 after the last epoch, one view: mean ± standard deviation of seeds {' '.join(map(str, seeds))}.\n"
        "GMACs: multiply-adds of one clip; norms, activations and softmax are not counted.\n"
        f"Speed: medians, the methods in turns, on random clips in batches of {' or '.join(map(str, sizes))}, on "
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}.\n"
        f"Training is forward, backward and the optimiser's step; peak memory is that of training, {memory}.\n"
    )


def accuracy_picture(rows: list[dict], path: Path) -> None:
    """Draw accuracy against GMACs, bars of one standard deviation; names where nothing else is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        spread = None if row["top1_std"] is None else 100 * row["top1_std"]
        axes.errorbar(row["gmacs"], 100 * row["top1"], yerr=spread, fmt="o", capsize=3, markersize=5)
    axes.set(xlabel="multiply-adds of a clip, G", ylabel="top-1, %")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # settles where the axes lie
    # The bars as rows of points, which names should not cover.
    heights = [[row["top1"] + step / 4 * (row["top1_std"] or 0) for step in range(-4, 5)] for row in rows]
    places = [(row["gmacs"], 100 * y) for row, ys in zip(rows, heights, strict=True) for y in ys]
    points = axes.transData.transform(places)
    taken = []
    for row in rows:
        label = axes.annotate(
            row["method"],
            (row["gmacs"], 100 * row["top1"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5},
        )
        label.set_in_layout(False)
        taken.append(place(label, points, taken, axes.bbox))
    figure.savefig(path)


def place(label, points, taken, inside):
    """Move a label to the nearest place that covers no other label and no point; returns its box, in pixels."""
    from matplotlib.text import Text

    ways = [(1, 0.4), (1, -1.2), (-1, 0.4), (-1, -1.2), (0, 1.2), (0, -2)]
    for distance in (7, 14, 24, 36, 50):
        for x, y in ways:
            label.set_position((x * distance, y * distance))
            label.set_horizontalalignment({1: "left", 0: "center", -1: "right"}[x])
            label.get_window_extent()  # of the name and its line; this also moves the name
            box = Text.get_window_extent(label)
            covers = any(box.overlaps(other) for other in taken) or box.padded(3).count_contains(points)
            if not covers and all(inside.contains(*corner) for corner in (box.min, box.max)):
                return box
    return box
