"""Augmentation: the same in all frames, a function of its arguments alone, right against Pillow."""

import os
import pickle
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from forks import run_in_a_fork


pytest.importorskip("kornia", reason="training-time augmentation needs kornia")

from hf_inti.data.augmentation import BatchMixing, ClipAugmentation, _rand_augment_ops  # noqa: E402


SSV2_FLIPS = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
JITTER = {"color_jitter": (0.4, 0.4, 0.2, 0.1), "color_jitter_prob": 0.8, "grayscale_prob": 0.2}
RECIPES = {
    "vifi_clip": {"crop": "multi_scale", "flip": True, **JITTER},
    "uniformerv2": {"rand_augment": "rand-m7-n4-mstd0.5-inc1", "flip": True},
    "zeroi2v": {
        "rand_augment": "rand-m7-n4-mstd0.5-inc1",
        "flip": True,
        "flip_label_map": SSV2_FLIPS,
        "random_erasing_prob": 0.25,
    },
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_clip(num_frames=3, h=40, w=56, seed=0):
    """Coloured noise without hard edges: (T, 3, h, w) uint8."""
    coarse = torch.rand(num_frames, 3, 6, 8, generator=seeded(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear").round().to(torch.uint8)


def repeated(frame, num_frames=4):
    return frame[None].expand(num_frames, *frame.shape).contiguous()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_treat_all_frames_alike_and_depend_on_the_arguments_alone(name):
    augment = ClipAugmentation(crop_size=32, **RECIPES[name])
    twin = pickle.loads(pickle.dumps(augment))  # as in a data-loading worker
    clip = repeated(smooth_clip(1)[0])
    untouched = clip.clone()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    seen = set()
    for seed in range(24):
        out, label = augment(clip, 93, seeded(seed))
        assert out.shape == (4, 3, 32, 32) and out.dtype == torch.uint8 and out.is_contiguous()
        assert (out == out[:1]).all(), f"frames differ at seed {seed}"
        torch.rand(3), random.random(), np.random.rand()  # the global state must not matter
        again, label_again = twin(clip, 93, seeded(seed))
        assert torch.equal(out, again) and label == label_again
        seen.add(out.sum().item())
    assert len(seen) > 12, "different seeds give different clips"
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    augment(clip, 93, seeded())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]
    assert torch.equal(clip, untouched)


def test_each_clip_takes_one_number_from_the_generator():
    ends = []
    for options in ({"crop": "center"}, *RECIPES.values()):
        generator = seeded(3)
        ClipAugmentation(crop_size=16, **options)(smooth_clip(), 0, generator)
        ends.append(torch.randint(1000, (4,), generator=generator).tolist())
    assert ends.count(ends[0]) == len(ends) > 1
    assert ends[0] != torch.randint(1000, (4,), generator=seeded(3)).tolist(), "the generator has advanced"


def test_everything_off_is_the_identity():
    clip = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    for crop in ("center", "random"):
        out, label = ClipAugmentation(crop_size=32, crop=crop)(clip, 7, seeded())
        assert torch.equal(out, clip) and label == 7
    out, _ = ClipAugmentation(crop_size=32, area=(1, 1), ratio=(1, 1))(clip, 7, seeded())
    assert torch.equal(out, clip)


@pytest.mark.parametrize("label_map", [None, SSV2_FLIPS])
def test_flip_mirrors_half_of_the_clips_and_maps_their_labels(label_map):
    clip = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    augment = ClipAugmentation(crop_size=16, crop="center", flip=True, flip_label_map=label_map)
    generator, flips = seeded(), 0
    for _ in range(200):
        out, label = augment(clip, 93, generator)
        flipped = not torch.equal(out, clip)
        assert torch.equal(out, clip.flip(3) if flipped else clip)
        assert label == (94 if flipped and label_map else 93)
        assert augment(clip, 5, generator)[1] == 5, "labels outside the map stay"
        flips += flipped
    assert 70 < flips < 130


def position_clip(h, w):
    """Red holds the row and green the column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([rows, columns, rows]).to(torch.uint8)[None]


def test_multi_scale_crop_takes_vifi_clips_sizes_and_positions():
    augment = ClipAugmentation(crop_size=8, crop="multi_scale")
    h, w, sides, boxes = 60, 100, [60, 52, 45, 39], set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(3000):
            boxes.add(augment._crop_box(h, w))
    wanted = set()
    for i, height in enumerate(sides):
        for j, width in enumerate(sides):
            if abs(i - j) <= 1:
                y, x = h - height, w - width
                places = [(0, 0), (0, x), (y, 0), (y, x), (y // 2, x // 2)]
                wanted |= {(top, left, height, width) for top, left in places}
    assert boxes == wanted


def test_random_resized_crop_keeps_to_area_and_ratio_and_shows_its_box():
    augment = ClipAugmentation(crop_size=16, area=(0.2, 0.5), ratio=(0.75, 4 / 3))
    h, w = 90, 120
    shares = []
    for seed in range(60):
        out, _ = augment(position_clip(h, w), 0, seeded(seed))
        rows, columns = out[0, 0].float(), out[0, 1].float()
        # pixel centres are side / 16 apart; differences along the axis give the sides of the box
        height, width = (rows[12, 8] - rows[4, 8]) * 2, (columns[8, 12] - columns[8, 4]) * 2
        assert 0.65 < width / height < 1.5
        assert (rows[:, :1] - rows).abs().max() <= 1 and (columns[:1] - columns).abs().max() <= 1, "upright"
        shares.append((height * width / (h * w)).item())
    assert 0.15 < min(shares) < 0.27 and 0.42 < max(shares) < 0.57


def test_random_and_centre_crops_are_cut_out_without_resampling():
    clip = position_clip(20, 30)
    out, _ = ClipAugmentation(crop_size=16, crop="center")(clip, 0, seeded())
    assert torch.equal(out, clip[:, :, 2:18, 7:23])
    augment, corners = ClipAugmentation(crop_size=16, crop="random"), set()
    for seed in range(200):
        out, _ = augment(clip, 0, seeded(seed))
        top, left = out[0, :2, 0, 0].tolist()
        assert torch.equal(out, clip[:, :, top : top + 16, left : left + 16])
        corners.add((top, left))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 4, 0, 14)


def test_downscaling_is_antialiased():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., 1::4] = 255  # without a filter these come out near 150
    out, _ = ClipAugmentation(crop_size=16, area=(1, 1), ratio=(1, 1))(stripes, 0, seeded())
    assert (out[..., 2:-2].int() - 64).abs().max() < 10, "fine stripes blur to their mean"


@pytest.mark.parametrize("crop", ["random_resized", "multi_scale", "random", "center"])
@pytest.mark.parametrize("size", [(5, 7), (7, 200), (40, 6)])
def test_frames_smaller_than_the_crop_and_single_frames(crop, size):
    augment = ClipAugmentation(crop_size=24, **RECIPES["zeroi2v"] | JITTER | {"crop": crop})
    for seed in range(8):
        out, _ = augment(smooth_clip(1, *size), 0, seeded(seed))
        assert out.shape == (1, 3, 24, 24)


def test_colour_jitter_and_greyscale_rates():
    clip = smooth_clip(1, 8, 8)
    jitter = ClipAugmentation(crop_size=8, crop="center", color_jitter_prob=0.8)
    grey = ClipAugmentation(crop_size=8, crop="center", grayscale_prob=0.2)
    generator, jittered, greyed = seeded(), 0, 0
    for _ in range(300):
        jittered += not torch.equal(jitter(clip, 0, generator)[0], clip)
        out = grey(clip, 0, generator)[0]
        is_grey = bool((out == out[:, :1]).all())
        assert is_grey or torch.equal(out, clip)
        greyed += is_grey
    assert 210 < jittered < 270 and 35 < greyed < 90


def test_colour_jitter_strengths():
    grey = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)  # only brightness can change a grey frame
    augment = ClipAugmentation(crop_size=8, crop="center", color_jitter_prob=1.0)
    values = [augment(grey, 0, seeded(s))[0].float().mean().item() for s in range(150)]
    assert 59 <= min(values) < 70 and 130 < max(values) <= 141


def test_random_erasing_leaves_one_grey_box():
    clip = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    augment = ClipAugmentation(crop_size=32, crop="center", random_erasing_prob=0.25)
    erased, shares = 0, []
    for seed in range(300):
        out, _ = augment(clip, 0, seeded(seed))
        rows, columns = (out[0, 0] > 0).any(1), (out[0, 0] > 0).any(0)
        box = (rows[:, None] & columns) * 128
        assert (out == box).all(), "a rectangle of 128, the same in all frames and channels"
        if rows.any():
            erased += 1
            shares.append(box.bool().float().mean().item())
    assert 50 < erased < 105 and min(shares) > 0.01 and 0.2 < max(shares) < 0.36


# RandAugment against Pillow, which the sources call


def pillow_results(image, level):
    """What SlowFast's operations do with a PIL image at `level` of 10, for both directions."""
    from PIL import Image, ImageEnhance, ImageOps

    share, grey, bilinear = level / 10, (128, 128, 128), Image.Resampling.BILINEAR
    w, h = image.size

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=grey)

    def both(do):
        return [do(share), do(-share)]

    def enhance(kind):
        return both(lambda s: kind(image).enhance(1 + 0.9 * s))

    brighter = [min(255, i + int(share * 110)) if i < 128 else i for i in range(256)]
    return {
        "auto_contrast": [ImageOps.autocontrast(image)],
        "equalize": [ImageOps.equalize(image)],
        "invert": [ImageOps.invert(image)],
        "rotate": both(lambda s: image.rotate(30 * s, bilinear, fillcolor=grey)),
        "posterize": [ImageOps.posterize(image, 4 - int(share * 4))],
        "solarize": [ImageOps.solarize(image, 256 - int(share * 256))],
        "solarize_add": [image.point(brighter * 3)],
        "color": enhance(ImageEnhance.Color),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": both(lambda s: affine(1, 0.3 * s, 0, 0, 1, 0)),
        "shear_y": both(lambda s: affine(1, 0, 0, 0.3 * s, 1, 0)),
        "translate_x": both(lambda s: affine(1, 0, 0.45 * s * w, 0, 1, 0)),
        "translate_y": both(lambda s: affine(1, 0, 0, 0, 1, 0.45 * s * h)),
    }


@pytest.mark.parametrize("level", [0.0, 3.0, 7.0, 9.6])
def test_rand_augment_operations_agree_with_pillow(level):
    image_module = pytest.importorskip("PIL.Image")
    noise = torch.randint(-20, 21, (2, 3, 60, 80), generator=seeded(4))  # for sharpness to have an effect
    clip = (smooth_clip(2, 60, 80) + noise).clamp(0, 255).to(torch.uint8)
    images = [image_module.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip]
    results = [pillow_results(image, level) for image in images]
    ops = _rand_augment_ops()
    assert len(ops) == 15 and ops.keys() == results[0].keys()
    for name, op in ops.items():
        directions = range(len(results[0][name]))
        theirs = [torch.from_numpy(np.stack([r[name][d] for r in results])) for d in directions]
        ours = [(op(clip / 255, sign * level / 10) * 255).round().permute(0, 2, 3, 1) for sign in (1, -1)]
        errors = torch.tensor([[(a - b).abs().mean() for b in theirs] for a in ours])  # ours x theirs
        # Rounding makes half a level. The warps may lie half a pixel apart along an edge to grey.
        warps = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
        tolerance = 2.5 if warps else 0.6
        if len(theirs) == 1:
            assert errors.max() < tolerance, (name, errors)
        else:  # our two directions are theirs, in one order or the other
            straight, crossed = errors.diagonal(), errors.flip(1).diagonal()
            assert min(straight.max(), crossed.max()) < tolerance, (name, errors)
            assert level == 0 or max(straight.min(), crossed.min()) > 3, (name, errors)


def test_auto_contrast_leaves_a_flat_channel():
    flat = torch.full((1, 3, 4, 4), 0.8)
    assert torch.equal(_rand_augment_ops()["auto_contrast"](flat, 0.7), flat)


def test_rand_augment_does_each_drawn_operation_half_of_the_time():
    clip = torch.randint(60, 200, (1, 3, 12, 12), dtype=torch.uint8, generator=seeded())
    once = ClipAugmentation(crop_size=12, crop="center", rand_augment="rand-m7-n1-mstd0.5-inc1")
    same = sum(torch.equal(once(clip, 0, seeded(s))[0], clip) for s in range(300))
    assert 120 < same < 200
    many = ClipAugmentation(crop_size=12, crop="center", rand_augment="rand-m7-n20-mstd0.5-inc1")
    assert not any(torch.equal(many(clip, 0, seeded(s))[0], clip) for s in range(20))


def test_rand_augment_draws_its_magnitude_around_m_in_both_directions(monkeypatch):
    levels = []
    probe = {"probe": lambda x, level: levels.append(level) or x}
    monkeypatch.setattr("hf_inti.data.augmentation._rand_augment_ops", lambda: probe)
    clip = smooth_clip(1, 8, 8)
    for m, mean, std in ((7, 0.7, 0.05), (10, 0.98, 0.03)):  # the second is cut off at 1
        ClipAugmentation(crop_size=8, rand_augment=f"rand-m{m}-n2000-mstd0.5-inc1")(clip, 0, seeded())
        drawn = torch.tensor(levels)
        assert 900 < len(drawn) < 1100 and 0.45 < (drawn > 0).float().mean() < 0.55
        assert abs(drawn.abs().mean() - mean) < 0.01 and abs(drawn.abs().std() - std) < 0.01
        assert drawn.abs().max() <= 1
        levels.clear()


# Mixing

MIXINGS = {
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
    "both": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
}


def constant_batch(b, t=3, side=20):
    """Clip i is filled with i; labels are 0 .. b - 1."""
    return torch.arange(b).float()[:, None, None, None, None].expand(b, t, 3, side, side), torch.arange(b)


@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("b", [1, 2, 5])
def test_targets_say_what_the_pixels_hold(kind, b):
    """Clip i holds the value i alone, so the share of each clip in a mixture can be read off its pixels."""
    num_classes = 7
    mixing = BatchMixing(num_classes=num_classes, **MIXINGS[kind])
    smoothing = MIXINGS[kind].get("label_smoothing", 0.0)
    for seed in range(20):
        pixels, labels = constant_batch(b)
        mixed, targets = mixing(pixels, labels, seeded(seed))
        assert mixed.shape == pixels.shape and targets.shape == (b, num_classes)
        assert torch.equal(pixels, constant_batch(b)[0]), "the input is left alone"
        torch.testing.assert_close(targets.sum(1), torch.ones(b))
        shares = (targets - smoothing / num_classes) / (1 - smoothing)
        torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), shares[:, :b] @ torch.arange(b).float())
        assert shares[:, b:].abs().max() < 1e-6
        # a permutation with one lambda: all that clips give away is also received
        torch.testing.assert_close(shares.sum(0)[:b], torch.ones(b))
        kept = {round(shares[i, i].item(), 4) for i in range(b) if shares[i, i] < 1 - 1e-5}
        assert len(kept) <= 1, "one lambda per batch"


def test_cutmix_cuts_one_box_for_all_frames_and_clips():
    mixing = BatchMixing(num_classes=6, cutmix_alpha=1.0)
    boxes = set()
    for seed in range(30):
        pixels, labels = constant_batch(6, t=4)
        mixed, targets = mixing(pixels, labels, seeded(seed))
        changed = mixed != pixels  # (B, T, 3, H, W)
        moved = changed.flatten(1).any(1)
        if not moved.any():
            continue
        mask = changed[moved][0, 0, 0]
        assert (changed[moved] == mask).all()
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns), "a box"
        for i in moved.nonzero().flatten().tolist():
            assert abs(targets[i, i].item() - (1 - mask.float().mean().item())) < 1e-6, "the area left"
        boxes.add((*mask.nonzero()[0].tolist(), *mask.nonzero()[-1].tolist()))
    assert len(boxes) > 10


def test_mixup_lambda_follows_the_beta_distribution():
    mixing = BatchMixing(num_classes=2, mixup_alpha=0.2)
    generator, lambdas = seeded(), []
    for _ in range(600):
        _, targets = mixing(torch.zeros(2, 1, 3, 1, 1), torch.arange(2), generator)
        if targets[0, 0] < 1:
            lambdas.append(targets[0, 0].item())
    lambdas = torch.tensor(lambdas)
    assert 240 < len(lambdas) < 360, "half of the permutations of two swap them"
    assert abs(lambdas.mean() - 0.5) < 0.06
    assert abs(lambdas.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.02  # of Beta(a, a); uniform has 1 / 12


@pytest.mark.parametrize("switch_prob,low,high", [(0.0, 0, 0), (0.5, 70, 130), (1.0, 190, 200)])
def test_switch_prob_chooses_cutmix(switch_prob, low, high):
    mixing = BatchMixing(num_classes=8, mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=switch_prob)
    generator, cuts = seeded(), 0
    for _ in range(200):
        mixed, _ = mixing(*constant_batch(8, t=1), generator)
        per_clip = mixed.flatten(1)
        cuts += bool((per_clip.amax(1) > per_clip.amin(1)).any())  # mixup keeps a constant clip constant
    assert low <= cuts <= high


def test_without_mixing_only_the_labels_are_smoothed():
    pixels, labels = constant_batch(3)
    mixed, targets = BatchMixing(num_classes=4, label_smoothing=0.1)(pixels, labels, seeded())
    assert torch.equal(mixed, pixels)
    wanted = torch.full((3, 4), 0.025)
    wanted[range(3), range(3)] = 0.925
    torch.testing.assert_close(targets, wanted)
    assert torch.equal(BatchMixing(num_classes=4)(pixels, labels, seeded())[1], torch.eye(4)[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_depends_on_its_arguments_alone(dtype):
    mixing = BatchMixing(num_classes=5, **MIXINGS["both"])
    pixels, labels = torch.randn(4, 2, 3, 6, 6, generator=seeded()).to(dtype), torch.tensor([0, 4, 2, 2])
    before = torch.get_rng_state()
    first = mixing(pixels, labels, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    second = mixing(pixels, labels, seeded(3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].dtype == dtype and first[1].dtype == torch.float32


# Errors, imports, real video


@pytest.mark.parametrize(
    "options,said",
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"crop": "corner"}, "multi_scale"),
        ({"area": (0.5, 1.2)}, "high <= 1"),
        ({"area": (0.0, 1.0)}, "0 < low"),
        ({"ratio": (2.0, 1.0)}, "low <= high"),
        ({"flip_label_map": {86: 87, 87: 86}}, "flip=True"),
        ({"flip": True, "flip_label_map": {86: 87}}, r"no reverse mapping for \[86\]"),
        ({"color_jitter": (0.4, 0.4, 0.2, 0.6)}, "hue"),
        ({"color_jitter": (0.4, 0.4)}, "four"),
        ({"color_jitter_prob": 1.1}, "0 to 1"),
        ({"grayscale_prob": -0.1}, "0 to 1"),
        ({"random_erasing_prob": float("nan")}, "0 to 1"),
        ({"rand_augment": "rand-m11-n4-mstd0.5-inc1"}, "0 to 10"),
        ({"rand_augment": "rand-m7-n0-mstd0.5-inc1"}, "1 or more"),
        ({"rand_augment": "rand-m7-n4-w0"}, "inc1"),
        ({"rand_augment": ""}, "inc1"),
    ],
)
def test_bad_clip_options_name_the_valid_range(options, said):
    with pytest.raises(ValueError, match=said) as error:
        ClipAugmentation(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options,said",
    [
        ({"num_classes": 0}, "at least 1"),
        ({"mixup_alpha": -1.0}, "at least 0"),
        ({"cutmix_alpha": float("nan")}, "at least 0"),
        ({"switch_prob": 2.0}, "0 to 1"),
        ({"label_smoothing": -0.1}, "0 to 1"),
    ],
)
def test_bad_mixing_options_name_the_valid_range(options, said):
    with pytest.raises(ValueError, match=said):
        BatchMixing(**{"num_classes": 3} | options)


def test_bad_inputs_are_refused():
    augment = ClipAugmentation(crop="center")
    for frames in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3).byte(), torch.zeros(0, 3, 8, 8).byte()):
        with pytest.raises(ValueError, match=r"uint8 \(T, 3, h, w\)"):
            augment(frames, 0, seeded())
    mixing, pixels = BatchMixing(num_classes=3, mixup_alpha=1.0), torch.zeros(2, 1, 3, 4, 4)
    for bad_pixels, count in ((pixels[0], 1), (pixels, 3), (pixels.byte(), 2), (pixels[:0], 0)):
        with pytest.raises(ValueError, match=r"float \(B, T, 3, H, W\)"):
            mixing(bad_pixels, torch.zeros(count, dtype=torch.long), seeded())
    for bad_labels in ([0, 3], [-1, 0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="integers from 0 to 2"):
            mixing(pixels, torch.tensor(bad_labels), seeded())


def test_kornia_is_imported_late_and_without_warnings():
    code = (
        "import sys, warnings; from hf_inti.data.augmentation import BatchMixing, ClipAugmentation; "
        "assert 'kornia' not in sys.modules; warnings.simplefilter('error'); "
        "ClipAugmentation(); assert 'kornia' in sys.modules"
    )
    status, _, error = run_in_a_fork(code, cwd=Path(__file__).parents[1])
    assert status == 0, error


@pytest.mark.skipif("HF_INTI_TEST_DATA" not in os.environ, reason="HF_INTI_TEST_DATA is not set")
@pytest.mark.parametrize("name", RECIPES)
def test_frames_of_a_real_clip_are_augmented_independently(name):
    av = pytest.importorskip("av")
    with av.open(str(Path(os.environ["HF_INTI_TEST_DATA"]) / "videos" / "demo.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), 0, 40, 10)]
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    augment = ClipAugmentation(crop_size=64, **RECIPES[name])
    whole, _ = augment(clip, 86, seeded(1))
    assert len(clip) == 4 and not torch.equal(whole[0], whole[3])
    for t in range(len(clip)):
        alone, _ = augment(clip[t : t + 1], 86, seeded(1))
        assert torch.equal(whole[t], alone[0])
