"""Pictures: the paper's Figure 4, confusion matrices, training curves. matplotlib is imported when one is drawn."""

import json
from pathlib import Path

import torch


def cascaded_weights(interpolation_weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How much each input frame's tokens count in the merged frames: the weights multiplied over the stages.

    Args:
        interpolation_weights: of each stage, alpha and beta (B, T_out, L, 2), first stage first, as the model returns.

    Returns (B, T, L) for the T frames that enter the first stage; where alpha + beta = 1, the weights of the frames
    that end up in one merged frame sum to 1 (InTI, Fig. 4).
    """
    if not interpolation_weights:
        raise ValueError("there are no interpolation weights; Figure 4 needs a model whose compression is inti.")
    product = None
    for weights in reversed(interpolation_weights):
        B, T_out, L, _ = weights.shape
        frames = weights.permute(0, 1, 3, 2).reshape(B, 2 * T_out, L)  # this stage's input frames in order
        product = frames if product is None else frames * product.repeat_interleave(2, dim=1)
    return product


def aggregated_frames(frames: torch.Tensor, weights: torch.Tensor, merged: int) -> torch.Tensor:
    """Pixels summed as the tokens were: frames (T, 3, H, W), weights (T, rows, columns) -> (merged, 3, H, W)."""
    size = frames.shape[-2:]
    # Each patch's weight stands for all of its pixels.
    per_pixel = torch.nn.functional.interpolate(weights[:, None], size=size, mode="nearest")
    return (frames * per_pixel).unflatten(0, (merged, -1)).sum(1)


def figure4(frames: torch.Tensor, weights: torch.Tensor, merged: int, path: Path, title: str = "") -> None:
    """Draw the paper's Figure 4: input frames, their weights as heat maps, the aggregated frames.

    Args:
        frames: (T, 3, H, W) in [0, 1], what the model sees before normalisation.
        weights: (T, rows, columns), of the patches, as `cascaded_weights` gives them.
        merged: how many frames they end up in.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    T = frames.shape[0]
    per_merged = T // merged
    columns = min(T, max(per_merged, 8 // per_merged * per_merged))  # whole groups, about 8 frames in a row
    bands = -(-T // columns)
    figure = Figure(figsize=(1.5 * columns + 0.8, 4.8 * bands), layout="constrained")
    grid = figure.add_gridspec(3 * bands, columns)
    aggregated = aggregated_frames(frames, weights, merged).clamp(0, 1)
    pictures = frames.permute(0, 2, 3, 1).numpy()
    maps = []
    for t in range(T):
        row, column = 3 * (t // columns), t % columns
        shown = figure.add_subplot(grid[row, column])
        shown.imshow(pictures[t])
        shown.set_title(f"frame {t + 1}", fontsize=8)
        heat = figure.add_subplot(grid[row + 1, column])
        maps.append(heat.imshow(weights[t].numpy(), cmap="inferno", vmin=0, vmax=float(weights.max())))
        heat.set_title(f"mean {weights[t].mean():.2f}", fontsize=8)
        if t % per_merged == 0:
            j = t // per_merged
            merged_axes = figure.add_subplot(grid[row + 2, column : column + per_merged])
            merged_axes.imshow(aggregated[j].permute(1, 2, 0).numpy())
            merged_axes.set_title(f"aggregated {j + 1}", fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    # Without panchor=False it would push the aggregated frames to the right end of their groups.
    figure.colorbar(maps[0], ax=figure.axes, shrink=0.4, label="predicted weight", panchor=False)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def left_of_frames(frames: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Frames with each patch as the mean of all patches in its token, white where it was dropped.

    Args:
        frames: (T, 3, H, W) in [0, 1].
        source: (T, 1 + N), of `output_token_source=True`; N patches of a square grid.

    Returns (T, 3, H, W).
    """
    T, _, H, W = frames.shape
    groups = source[:, 1:]
    side = round(groups.shape[1] ** 0.5)
    p, q = H // side, W // side
    patches = frames.unflatten(2, (side, p)).unflatten(4, (side, q)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    same = (groups[:, :, None] == groups[:, None, :]).to(frames.dtype)  # (T, N, N)
    means = torch.einsum("tnm,tmcpq->tncpq", same / same.sum(-1, keepdim=True), patches)
    means[groups < 0] = 1.0
    return means.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).reshape(T, 3, side * p, side * q)


def token_pictures(frames: torch.Tensor, source: torch.Tensor, path: Path, title: str = "") -> None:
    """Draw what ToMe's merging or STA's pruning leaves of each frame; arguments as of `left_of_frames`."""
    from matplotlib.figure import Figure

    T = frames.shape[0]
    columns = min(T, 8)
    bands = -(-T // columns)
    figure = Figure(figsize=(1.5 * columns, 3.6 * bands), layout="constrained")
    left = left_of_frames(frames, source)
    for t in range(T):
        for row, pictures in enumerate((frames, left)):
            place = (2 * (t // columns) + row) * columns + t % columns + 1
            axes = figure.add_subplot(2 * bands, columns, place)
            axes.imshow(pictures[t].clamp(0, 1).permute(1, 2, 0).numpy())
            number = source[t, 1:].unique()
            axes.set_title(f"frame {t + 1}" if row == 0 else f"{(number >= 0).sum()} tokens", fontsize=8)
            axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def draw_compression(outputs, frames: torch.Tensor, patch_size: int, path, title: str = "") -> str | None:
    """Draw what a compression did to a clip: `figure4` of merged frames, `token_pictures` of merged or lost tokens.

    Args:
        outputs: the model's, of one clip, with `output_interpolation_weights=True, output_token_source=True`.
        frames: (T, 3, H, W) in [0, 1], what the model saw before normalisation; UniFormerV2 may have halved them.
        patch_size: of the model.
        path: the PNG to write, or a file.

    Returns a sentence that says what is to be seen; draws nothing and returns None where nothing changed.
    """
    if outputs.interpolation_weights:
        weights = cascaded_weights(outputs.interpolation_weights)[0, :, 1:].float().cpu()  # (T', N)
        weights = weights.round(decimals=4)  # the same picture whatever the last bits, which hang on threads
        shown = frames[:: len(frames) // len(weights)]
        merged = outputs.interpolation_weights[-1].shape[1]
        figure4(shown, weights.unflatten(1, (frames.shape[-2] // patch_size, -1)), merged, path, title)
        return f"{len(shown)} frames, the weights of their patches, and {merged} frames summed with these weights."
    if outputs.token_source is None:
        return None
    source = outputs.token_source[0].cpu()  # (T', 1 + N)
    if torch.equal(source, torch.arange(source.shape[1]).expand_as(source)):
        return None
    token_pictures(frames[:: len(frames) // len(source)], source, path, title)
    return "The frames, and what is left: each patch as the mean of its token, white where it was dropped."


def confusion_matrix(counts, label_names: list[str], path: Path) -> None:
    """Draw counts (K, K), rows the true classes, as shares of each row; labelled where they can be read."""
    from matplotlib.figure import Figure

    counts = torch.as_tensor(counts, dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    K = len(label_names)
    side = min(4 + 0.35 * K, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if K <= 40:
        axes.set_xticks(range(K), label_names, rotation=90)
        axes.set_yticks(range(K), label_names)
    if K <= 20:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                if share >= 0.005:
                    colour = "white" if share > 0.5 else "black"
                    axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, shrink=0.7, label="share of the true class")
    figure.savefig(path, dpi=120)


def training_curves(runs: dict[str, Path], path: Path) -> None:
    """Draw training loss and evaluation accuracy against epochs, of runs by name with their metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, file in runs.items():
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        losses = [line for line in lines if "loss" in line]
        scores = [line for line in lines if "eval_top1" in line]
        loss.plot([line["step"] for line in losses], [line["loss"] for line in losses], label=name)
        accuracy.plot([line["epoch"] for line in scores], [100 * line["eval_top1"] for line in scores], label=name)
    loss.set(xlabel="optimiser step", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="top-1 on the evaluation videos, %", ylim=(0, 100))
    accuracy.legend()
    figure.savefig(path, dpi=120)
