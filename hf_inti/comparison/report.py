"""The comparison of methods as a table (Markdown and CSV) and as a picture of accuracy against multiply-adds."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, mean, stdev

from scipy.stats import t

from ..measure.jobs import write_json
from ..measure.records import provenance, source_line
from ..measure.tables import markdown_table


def write_report(
    results: dict[str, list[dict]],
    measurements: dict[str, dict],
    seeds: list[int],
    about: str,
    folder: Path,
    folds: Sequence[str] = (),
    orders: Sequence[str] = (),
) -> str:
    """Write comparison.json, .csv, .md and .png into `folder`.

    Args:
        results: of each method the last evaluation of each run, with `eval_top1` in [0, 1], by seed and in each seed by
            fold; the others are compared with the first, run by run. A baseline has no seeds, and no measurements.
        measurements: of each method what `measure` or `counts_of` returns.
        seeds: in the order of `results`.
        about: what was trained on what, for the line below the table.
        folds: their names, in the order of `results`; evaluations then need `eval_num_videos`.
        orders: of frames in the test, by whose names evaluations have further accuracies.

    Returns the text of comparison.md.
    """
    folder.mkdir(parents=True, exist_ok=True)  # no run made it if all were done elsewhere
    rows, first = [], None
    for method, of_runs in results.items():
        numbers = {name: value for name, value in measurements.get(method, {}).items() if name != "conditions"}
        row = {"method": method, **accuracies(of_runs, len(seeds), len(folds))}
        top1 = row["top1_of_folds" if folds else "top1_of_seeds"]
        videos = [found["eval_num_videos"] for found in of_runs] if folds else None
        first = first or top1
        for order in orders:
            found = accuracies([{**run, "eval_top1": run[order]} for run in of_runs], len(seeds), len(folds))
            row |= {order: found["top1"], f"{order}_std": found["top1_std"]}
        rows.append({**row, **paired_difference(top1, first, videos), **numbers})
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        lists = [{name: value for name, value in row.items() if isinstance(value, list)} for row in rows]
        joined = [{name: " ".join(map(str, values)) for name, values in found.items()} for found in lists]
        writer.writerows({**row, **found} for row, found in zip(rows, joined, strict=True))
    conditions = [m["conditions"] for m in measurements.values() if "conditions" in m]
    record = provenance()
    text = f"{markdown(rows, orders)}\n{notes(conditions, seeds, about, len(folds), orders)}\n{source_line(record)}\n"
    (folder / "comparison.md").write_text(text)
    record |= {"about": about, "seeds": seeds, "conditions": conditions[0] if conditions else None, "rows": rows}
    write_json(folder / "comparison.json", record | ({"folds": list(folds)} if folds else {}))
    accuracy_picture(rows, folder / "comparison.png")
    return text


def accuracies(of_runs: list[dict], seeds: int, folds: int) -> dict:
    """The accuracies of a row: of a seed, that of the videos of all folds together.

    The spread is that of the seeds; with one seed that of the folds, if there are any.
    """
    size = max(1, folds)
    of_seeds = [pooled(of_runs[i : i + size]) for i in range(0, len(of_runs), size)]
    of_folds = [found["eval_top1"] for found in of_runs]
    spread_over = of_folds if folds and seeds == 1 else of_seeds
    spread = stdev(spread_over) if len(spread_over) > 1 else None  # one has no spread
    row = {"top1": mean(of_seeds), "top1_std": spread, "top1_of_seeds": of_seeds}
    return row | ({"top1_of_folds": of_folds} if folds else {})


def pooled(evaluations: list[dict]) -> float:
    """The accuracy on the videos of all evaluations together."""
    if len(evaluations) == 1:
        return evaluations[0]["eval_top1"]
    return fmean([found["eval_top1"] for found in evaluations], [found["eval_num_videos"] for found in evaluations])


def paired_difference(
    top1: list[float], first: list[float], videos: list[int] | None = None
) -> dict[str, float | None]:
    """The mean of `top1` less `first`, run by run, and half of its 95% interval by Student's t.

    Runs count by their `videos`, so that the mean is the difference of the accuracies on all of them; its variance is
    that of a ratio, which for runs of one size is the usual one. Both are None for the first method itself, and for a
    baseline that lacks the runs' seeds.
    """
    if top1 is first or len(top1) != len(first) or len(first) < 2:
        return {"over_first": None, "over_first_interval": None}
    count = len(first)
    videos = videos or [1] * count
    differences = [a - b for a, b in zip(top1, first, strict=True)]
    over = fmean(differences, videos)
    squares = sum((n / sum(videos) * (each - over)) ** 2 for n, each in zip(videos, differences, strict=True))
    interval = t.ppf(0.975, count - 1) * (squares * count / (count - 1)) ** 0.5
    return {"over_first": over, "over_first_interval": float(interval)}


def percent(value: float | None, spread: float | None, sign: str = "") -> str:
    """A share and its spread, such as 81.2 ± 0.7."""
    if value is None:
        return "-"
    return f"{100 * value:{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def markdown(rows: list[dict], orders: Sequence[str]) -> str:
    """The table; what was not measured of a row is a dash."""
    columns = {
        "gmacs": ("GMACs", 1, ".4g"),
        "parameters": ("M params", 1e6, ".3g"),
        "trained_parameters": ("M trained", 1e6, ".3g"),
        "forward_clips_per_second": ("forward clips/s", 1, ".4g"),
        "training_clips_per_second": ("training clips/s", 1, ".4g"),
        "peak_memory_bytes": ("peak memory MB", 1e6, ".0f"),
    }
    lines = []
    measured = [name for name in columns if any(row.get(name) is not None for row in rows)]
    for row in rows:
        cells = [percent(row["top1"], row["top1_std"]), percent(row["over_first"], row["over_first_interval"], "+")]
        cells += [percent(row[order], row[f"{order}_std"]) for order in orders]
        for name in measured:
            _, unit, form = columns[name]
            cells.append("-" if row.get(name) is None else f"{row[name] / unit:{form}}")
        lines.append([row["method"], *cells])
    heads = ["method", "top-1 %", "over the first", *(f"{order} %" for order in orders)]
    return markdown_table([*heads, *(columns[name][0] for name in measured)], lines)


def notes(conditions: list[dict], seeds: list[int], about: str, folds: int, orders: Sequence[str]) -> str:
    of_seeds, by = f"mean ± standard deviation of seeds {' '.join(map(str, seeds))}", "seed by seed"
    if folds:
        several = len(seeds) > 1
        spread = of_seeds if several else f"± standard deviation of the folds, seed {seeds[0]}"
        of_seeds = f"the videos of all {folds} folds together, {spread}"
        by = "seed by seed and fold by fold" if several else "fold by fold"
    names = ", ".join(f"{order} %" for order in orders).capitalize()
    order_note = f"{names}: top-1 of the same models, the frames of each test clip in that order.\n" if orders else ""
    text = (
        f"{about}.\n"
        f"Top-1 after the last epoch: {of_seeds}.\n"
        f"Over the first method: the mean difference, {by}, ± half of its 95% interval (Student's t).\n"
        f"{order_note}"
        "GMACs: multiply-adds of one clip; norms, activations and softmax are not counted.\n"
    )
    if not conditions:
        return text
    first, sizes = conditions[0], sorted({c["batch_size"] for c in conditions})
    memory = "all that was allocated" if first["device"].startswith("cuda") else "what it takes beyond the loaded model"
    return text + (
        f"Speed: medians, the methods in turns, on random clips in batches of {' or '.join(map(str, sizes))}, on "
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}.\n"
        f"Training is forward, backward and the optimiser's step; peak memory is that of training, {memory}.\n"
    )


def accuracy_picture(rows: list[dict], path: Path) -> None:
    """Draw accuracy against multiply-adds and against time, bars of one standard deviation, baselines as lines."""
    from matplotlib.figure import Figure

    baselines = [row for row in rows if row.get("gmacs") is None]
    costs = {
        "multiply-adds of a clip, G": {row["method"]: row["gmacs"] for row in rows if row.get("gmacs")},
        "forward pass of a clip, ms": {
            row["method"]: 1000 / row["forward_clips_per_second"] for row in rows if row.get("forward_clips_per_second")
        },
    }
    costs = {label: by_method for label, by_method in costs.items() if by_method}
    figure = Figure(figsize=(7 * len(costs), 5), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (label, by_method) in zip(panels, costs.items(), strict=True):
        for row in (row for row in rows if row["method"] in by_method):
            spread = None if row["top1_std"] is None else 100 * row["top1_std"]
            axes.errorbar(by_method[row["method"]], 100 * row["top1"], yerr=spread, fmt="o", capsize=3, markersize=5)
        for row in baselines:
            axes.axhline(100 * row["top1"], color="0.5", linestyle="--", linewidth=1)
            right = (0.99, 100 * row["top1"])
            axes.annotate(row["method"], right, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set(xlabel=label)
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="top-1, %")
    figure.draw_without_rendering()  # settles where the axes lie
    for axes, by_method in zip(panels, costs.values(), strict=True):
        label_points(axes, [row for row in rows if row["method"] in by_method], by_method)
    figure.savefig(path)


def label_points(axes, rows: list[dict], costs: dict[str, float]) -> None:
    """Write each method's name where nothing else is."""
    # The bars as rows of points, which names should not cover.
    heights = [[row["top1"] + step / 4 * (row["top1_std"] or 0) for step in range(-4, 5)] for row in rows]
    places = [(costs[row["method"]], 100 * y) for row, ys in zip(rows, heights, strict=True) for y in ys]
    points = axes.transData.transform(places)
    taken = []
    for row in rows:
        label = axes.annotate(
            row["method"],
            (costs[row["method"]], 100 * row["top1"]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5},
        )
        label.set_in_layout(False)
        taken.append(place(label, points, taken, axes.bbox))


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
