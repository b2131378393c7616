"""Training-time augmentation of one clip, and mixing of a batch of clips.

Letters: B clips, T frames, h x w pixels of a decoded frame, H x W of the model's input, K classes.

kornia transforms the pixels. It draws from torch's global generator, so both classes here run under a fork of
that generator, seeded by one number from the generator they are given: the result depends only on the arguments,
and the global generator is left unchanged. This module adds what kornia 0.9 lacks: antialiased crops, ViFi-CLIP's
crop positions, labels that follow a flip, SlowFast's RandAugment (kornia's has no noise on the magnitude, no
"increasing" levels, no repeated operations), one Beta-distributed lambda per batch, soft targets.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


CROPS = ("random_resized", "multi_scale", "random", "center")
MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)  # ViFi-CLIP's, of the short side
CORNERS_AND_CENTRE = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))  # (down, right) in quarters of the margin
GREY = 128 / 255  # fill value of RandAugment's warps and of random erasing, as in their sources


class ClipAugmentation:
    """RandAugment, crop, flip, colour jitter, greyscale, erasing, in this order, identical in all frames.

    Args:
        crop_size: side of the output in pixels; every crop is resized to it (bicubic, antialiased).
        crop: "random_resized" (a random share of the area at a random ratio), "multi_scale" (height and width
            are 1, .875, .75 or .66 of the short side, at most one step apart, in a corner or the centre),
            "random" or "center" (a square of `crop_size`, or of the short side if that is smaller).
        area, ratio: ranges for "random_resized": share of the frame's area, width / height.
        flip: mirror left-right with probability 0.5.
        flip_label_map: the labels that mirroring swaps, both ways, e.g. {86: 87, 87: 86}.
        color_jitter: strengths of brightness, contrast, saturation and hue as torchvision defines them; one
            draw per clip (ViFi-CLIP redraws for each frame).
        color_jitter_prob, grayscale_prob, random_erasing_prob: probabilities, one draw per clip.
        rand_augment: timm's notation, "rand-m7-n4-mstd0.5-inc1": magnitude out of 10, number of operations,
            noise on the magnitude; bilinear. None is off.

    Raises:
        ValueError: an option is outside its range, or the frames are not uint8 (T, 3, h, w).
        ImportError: kornia is missing.

    Sources: ViFi-CLIP's and ZeroI2V's mmaction transforms, UniFormerV2's SlowFast (rand_augment.py).
    """

    def __init__(
        self,
        *,
        crop_size: int = 224,
        crop: str = "random_resized",
        area: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
        flip_label_map: dict[int, int] | None = None,
        color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        color_jitter_prob: float = 0.0,
        grayscale_prob: float = 0.0,
        rand_augment: str | None = None,
        random_erasing_prob: float = 0.0,
    ):
        if crop_size < 1:
            raise ValueError(f"crop_size must be at least 1, got {crop_size}; give the side of the output in pixels.")
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}.")
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(
                f"area must be (low, high) with 0 < low <= high <= 1, got {area}; give shares of the frame's area."
            )
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be (low, high) with 0 < low <= high, got {ratio}; give width / height.")
        label_map = flip_label_map or {}
        if label_map and not flip:
            raise ValueError(f"flip must be on with flip_label_map, got {flip}; set flip=True or leave the map out.")
        one_way = sorted(a for a, b in label_map.items() if label_map.get(b) != a)
        if one_way:
            raise ValueError(
                f"flip_label_map must map both ways, got no reverse mapping for {one_way}; with 86: 87 give 87: 86."
            )
        if len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter must be four numbers of at least 0, the last (hue) at most 0.5, got {color_jitter}."
            )
        _check_probabilities(color_jitter_prob=color_jitter_prob, grayscale_prob=grayscale_prob)
        _check_probabilities(random_erasing_prob=random_erasing_prob)
        try:
            from kornia import augmentation as K  # takes 0.3 s; prediction can skip it
        except ImportError as error:
            message = "ClipAugmentation needs kornia, which is not installed; run `pip install kornia==0.9.0`."
            raise ImportError(message) from error
        self.crop_size, self.crop, self.flip, self.flip_label_map = crop_size, crop, flip, label_map
        self.rand_augment = None if rand_augment is None else _parse_rand_augment(rand_augment)
        self.random_resized = K.RandomResizedCrop((crop_size,) * 2, scale=area, ratio=ratio)
        # kornia sees a clip as a batch of frames: same_on_batch gives all of them the same draw.
        ops = []
        if color_jitter_prob:
            ops.append(K.ColorJitter(*color_jitter, same_on_batch=True, p=color_jitter_prob))
        if grayscale_prob:
            ops.append(K.RandomGrayscale(same_on_batch=True, p=grayscale_prob))
        if random_erasing_prob:
            box = {"scale": (0.02, 1 / 3), "ratio": (0.3, 10 / 3)}  # mmaction2's share of the area and aspect
            ops.append(K.RandomErasing(**box, value=GREY, same_on_batch=True, p=random_erasing_prob))
        self.pixel_ops = nn.Sequential(*ops)

    def __call__(self, frames: Tensor, label: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """uint8 (T, 3, h, w) and its label to uint8 (T, 3, crop_size, crop_size) and its label.

        `generator` is on the CPU; one number is drawn from it per clip, whatever the options.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be uint8 (T, 3, h, w), got {frames.dtype} {tuple(frames.shape)}.")
        with _global_draws_from(generator):
            if self.rand_augment is not None:
                frames = _to_uint8(_rand_augment(_to_float(frames), *self.rand_augment))
            top, left, height, width = self._crop_box(*frames.shape[-2:])
            frames = frames[:, :, top : top + height, left : left + width]
            if (height, width) != (self.crop_size, self.crop_size):
                # on uint8, as the processor does at test time; float would take five times as long
                frames = F.interpolate(frames, (self.crop_size,) * 2, mode="bicubic", antialias=True)
            if self.flip and torch.rand(()) < 0.5:
                frames, label = frames.flip(-1), self.flip_label_map.get(label, label)
            if len(self.pixel_ops):
                frames = _to_uint8(self.pixel_ops(_to_float(frames)))
        return frames.contiguous(), label

    def _crop_box(self, h: int, w: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) in pixels, inside the frame."""
        if self.crop == "random_resized":
            corners = self.random_resized.forward_parameters(torch.Size((1, 3, h, w)))["src"][0]  # (4, 2)
            (left, top), (right, bottom) = corners[[0, 2]].long().tolist()  # the last pixels are inside
            return top, left, bottom - top + 1, right - left + 1
        if self.crop == "multi_scale":
            sides = [max(1, int(min(h, w) * scale)) for scale in MULTI_SCALES]
            pairs = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
            height, width = pairs[_randint(len(pairs))]
            down, right = CORNERS_AND_CENTRE[_randint(len(CORNERS_AND_CENTRE))]
            return (h - height) * down // 4, (w - width) * right // 4, height, width
        side = min(h, w, self.crop_size)
        if self.crop == "random":
            return _randint(h - side + 1), _randint(w - side + 1), side, side
        return (h - side) // 2, (w - side) // 2, side, side


class BatchMixing:
    """Mixup or CutMix of a batch of clips, with smoothed soft targets: ViFi-CLIP's rules.

    A batch is mixed with a random permutation of itself, with one lambda for all clips. CutMix cuts one box, the
    same in all frames and clips; its lambda is the share of the area outside the box. With both alphas 0 the
    pixels are unchanged and the targets only smoothed.

    Args:
        num_classes: K.
        mixup_alpha, cutmix_alpha: lambda ~ Beta(alpha, alpha); 0 turns that kind off.
        switch_prob: probability of CutMix if both kinds are on.
        label_smoothing: s; the correct class gets 1 - s + s / K, every other one s / K.

    Raises:
        ValueError: an option is outside its range, or the batch is not float (B, T, 3, H, W) with B labels.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {alpha}; 0 turns it off.")
        _check_probabilities(switch_prob=switch_prob, label_smoothing=label_smoothing)
        self.num_classes, self.label_smoothing, self.switch_prob = num_classes, label_smoothing, switch_prob
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha

    def __call__(self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """float (B, T, 3, H, W) and integer labels (B,) to mixed clips and float32 targets (B, K).

        `generator` is on the CPU; one number is drawn from it per batch. The input is left unchanged.
        """
        shape, num_classes, smoothing = pixel_values.shape, self.num_classes, self.label_smoothing
        if len(shape) != 5 or 0 in shape or not pixel_values.is_floating_point() or labels.shape != shape[:1]:
            got = f"{pixel_values.dtype} {tuple(shape)} with labels {tuple(labels.shape)}"
            raise ValueError(f"the batch must be float (B, T, 3, H, W) with labels (B,), got {got}.")
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must be integers from 0 to {num_classes - 1}, got {labels.tolist()}.")
        targets = F.one_hot(labels.long(), num_classes) * (1 - smoothing) + smoothing / num_classes  # (B, K)

        with _global_draws_from(generator):
            cut = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or bool(torch.rand(()) < self.switch_prob))
            alpha = self.cutmix_alpha if cut else self.mixup_alpha
            if alpha == 0:
                return pixel_values, targets
            lam = torch.distributions.Beta(alpha, alpha).sample().item()
            partner = torch.randperm(len(labels)).to(labels.device)
            top, bottom, left, right = _cut_box(*shape[-2:], 1 - lam)

        if cut:
            mixed = pixel_values.clone()
            mixed[..., top:bottom, left:right] = pixel_values[partner, :, :, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (shape[-2] * shape[-1])
        else:
            mixed = pixel_values * lam + pixel_values[partner] * (1 - lam)
        return mixed, targets * lam + targets[partner] * (1 - lam)


def _cut_box(h: int, w: int, share: float) -> tuple[int, int, int, int]:
    """Draw (top, bottom, left, right) of a box of `share` of the area, clipped at the border (CutMix)."""
    half_height, half_width = int(h * share**0.5) // 2, int(w * share**0.5) // 2
    y, x = _randint(h), _randint(w)
    return max(0, y - half_height), min(h, y + half_height), max(0, x - half_width), min(w, x + half_width)


def _parse_rand_augment(text: str) -> tuple[float, int, float]:
    """The magnitude out of 10, the number of operations and the standard deviation of the magnitude."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"rand-m{number}-n(\d+)-mstd{number}-inc1", text)
    if match is None or float(match[1]) > 10 or int(match[2]) < 1:
        raise ValueError(
            f"rand_augment must be 'rand-m<0 to 10>-n<1 or more>-mstd<0 or more>-inc1', got {text!r}; "
            "give for example 'rand-m7-n4-mstd0.5-inc1'."
        )
    return float(match[1]), int(match[2]), float(match[3])


def _rand_augment(frames: Tensor, magnitude: float, operations: int, noise: float) -> Tensor:
    """SlowFast's RandAugment on float frames (T, 3, h, w); each drawn operation is applied with probability 0.5."""
    ops = list(_rand_augment_ops().values())
    for _ in range(operations):
        op = ops[_randint(len(ops))]
        if torch.rand(()) < 0.5:
            level = min(10.0, max(0.0, magnitude + noise * torch.randn(()).item())) / 10
            frames = op(frames, level if torch.rand(()) < 0.5 else -level)
    return frames


@cache
def _rand_augment_ops() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """Operations on float frames (T, 3, h, w) in [0, 1], with the ranges of timm's "increasing" set.

    The second argument is the level in [-1, 1]; its sign matters only to operations with two directions.
    """
    from kornia import enhance
    from kornia.geometry import transform

    def auto_contrast(x: Tensor, level: float) -> Tensor:  # kornia's turns a flat channel black, Pillow's keeps it
        low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
        return torch.where(high > low, (x - low) / (high - low), x)

    def solarize_add(x: Tensor, level: float) -> Tensor:  # kornia's adds to all pixels, then inverts the bright ones
        return torch.where(x < GREY, (x + int(abs(level) * 110) / 255).clamp(max=1), x)

    def warp(by: Callable, x: Tensor, *amount: float) -> Tensor:  # kornia fills with 0, so grey is shifted to 0
        return by(x - GREY, torch.tensor(amount).expand(len(x), -1)) + GREY

    return {
        "auto_contrast": auto_contrast,
        "equalize": lambda x, level: enhance.equalize(x),
        "invert": lambda x, level: 1 - x,
        "rotate": lambda x, level: warp(lambda y, angle: transform.rotate(y, angle[:, 0]), x, level * 30),
        "posterize": lambda x, level: enhance.posterize(x, 4 - int(abs(level) * 4)),
        "solarize": lambda x, level: enhance.solarize(x, (256 - int(abs(level) * 256)) / 255),
        "solarize_add": solarize_add,
        "color": lambda x, level: enhance.adjust_saturation_with_gray_subtraction(x, 1 + level * 0.9),
        "contrast": lambda x, level: enhance.adjust_contrast_with_mean_subtraction(x, 1 + level * 0.9),
        "brightness": lambda x, level: enhance.adjust_brightness_accumulative(x, 1 + level * 0.9),
        "sharpness": lambda x, level: enhance.sharpness(x, 1 + level * 0.9),
        "shear_x": lambda x, level: warp(transform.shear, x, level * 0.3, 0.0),
        "shear_y": lambda x, level: warp(transform.shear, x, 0.0, level * 0.3),
        "translate_x": lambda x, level: warp(transform.translate, x, level * 0.45 * x.shape[-1], 0.0),
        "translate_y": lambda x, level: warp(transform.translate, x, 0.0, level * 0.45 * x.shape[-2]),
    }


@contextmanager
def _global_draws_from(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's global CPU generator by one number from `generator`; restore its state at exit."""
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        yield


def _randint(high: int) -> int:
    return int(torch.randint(high, ()))


def _to_float(frames: Tensor) -> Tensor:
    return frames.float().div_(255)


def _to_uint8(frames: Tensor) -> Tensor:
    return (frames * 255).round_().clamp_(0, 255).to(torch.uint8)


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}.")
