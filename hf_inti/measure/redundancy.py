"""The STA paper's two measures of what its pruning keeps (Sec. 3.3): trajectory sum and gradient norm."""

import torch
from torch import nn

from ..model.modeling_inti_clip import InTIClipForVideoClassification


def trajectory_sum(x: torch.Tensor) -> torch.Tensor:
    """How often the last frame's tokens have been seen before (STA, Eq. 6): tokens (B, T, N, C) -> (B,).

    The mean over the last frame's tokens of their largest cosine to a token of each earlier frame, summed over these
    frames: T - 1 where all frames are equal. Leave class tokens out.
    """
    unit = nn.functional.normalize(x, dim=-1)
    cosines = torch.einsum("bnc,btmc->btnm", unit[:, -1], unit[:, :-1])
    return cosines.amax(dim=-1).mean(dim=-1).sum(dim=-1)


def gradient_norm(
    model: InTIClipForVideoClassification, pixel_values: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """How much each token matters to the loss (STA, Eq. 7): the L1 norm of its gradient, summed over all blocks.

    Args:
        pixel_values: (B, T, 3, height, width).
        labels: (B,).

    Returns (B, T, 1 + N), class token first. Weights and their gradients stay as they are. Raises ValueError for a
    model whose compression changes the number of frames or tokens on the way: there is then no sum over blocks.
    """
    with torch.enable_grad():
        outputs = model(pixel_values, labels=labels, output_hidden_states=True)
        states = outputs.hidden_states[1:]  # the blocks' outputs
        if len({state.shape for state in states}) > 1:
            shapes = ", ".join(str(tuple(state.shape[1:3])) for state in states)
            raise ValueError(f"every block must give as many tokens, got (frames, tokens) {shapes}; compress less.")
        gradients = torch.autograd.grad(outputs.loss * len(labels), states)
    return torch.stack([gradient.abs().sum(dim=-1) for gradient in gradients]).sum(dim=0)
