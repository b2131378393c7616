import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPVisionModel

from forks import ALL, run_in_a_fork


SCRIPT = Path(__file__).parents[1] / "scripts" / "make_demo_data.py"
DEMO = runpy.run_path(str(SCRIPT))
CLASSES, PAIRS, render_clip = DEMO["CLASSES"], DEMO["PAIRS"], DEMO["render_clip"]


def test_pairs_are_neighbours_in_classes():
    assert len(PAIRS) == 4 and len(set(CLASSES)) == 8
    assert [(CLASSES[i], CLASSES[i + 1]) for i in range(0, 8, 2)] == PAIRS


@pytest.mark.parametrize("pair", PAIRS)
def test_second_class_is_the_first_one_backwards(pair):
    first, second = (render_clip(name, 7, num_frames=6, size=32) for name in pair)
    assert first.shape == (6, 32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first[::-1], second)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("pair", PAIRS)
def test_single_frames_are_distributed_alike_in_a_pair(pair):
    """Per index t: means over many clips of what a leak would show in, within their own standard error."""
    clips = [np.stack([render_clip(name, [k, i], 5, 16) for i in range(400)]) for k, name in enumerate(pair)]
    for t in range(5):
        x = [np.concatenate([c[:, t].mean((2, 3)), c[:, t].mean((1, 3))], 1) for c in clips]  # rows, columns
        error = np.sqrt(sum(part.var(0) / len(part) for part in x))
        z = np.abs(x[0].mean(0) - x[1].mean(0)) / error
        assert z.max() < 4.5, f"index {t}: {z.max():.1f} standard errors"


def test_the_attribute_starts_anywhere():
    """A clip that began at a fixed place would show it at its first frame."""
    clips = np.stack([render_clip("slides_right", i, 2, 16).astype(float).mean((1, 3)) for i in range(200)])
    brightest = (clips - np.median(clips, axis=2, keepdims=True)).argmax(2)  # (N, T), a column
    assert len(np.unique(brightest[:, 0])) == 16


def test_direction_is_what_the_name_says():
    """Circular shift that best maps a frame to the next one: to the right, for nearly all clips."""
    right = 0
    for i in range(40):
        columns = render_clip("slides_right", i, 9, 32).astype(float).mean((1, 3))  # (T, 32)
        columns = columns - columns.mean(0)  # without the background
        shifts = [
            np.mean([np.sum(np.roll(a, s) * b) for a, b in zip(columns, columns[1:], strict=False)])
            for s in range(-8, 9)
        ]
        right += np.argmax(shifts) > 8
    assert right >= 36


def test_test_clips_come_in_mirrored_twos(tmp_path):
    arguments = DEMO["Arguments"](str(tmp_path), num_frames=6, image_size=16)
    for label in range(0, 8, 2):
        first, second = (DEMO["make_clip"](1, 3, label + side, arguments) for side in (0, 1))
        np.testing.assert_array_equal(first[::-1], second)
    train = [DEMO["make_clip"](0, 3, label, arguments) for label in (0, 1)]
    assert not np.array_equal(train[0][::-1], train[1])


def test_seeds_and_splits_give_different_clips():
    clips = [render_clip("opens", seed, 2, 16) for seed in ([0, 0, 1], [0, 1, 1], [1, 0, 1])]
    assert not any(np.array_equal(clips[a], clips[b]) for a, b in [(0, 1), (0, 2), (1, 2)])


def test_stills_tell_their_class_in_any_frame_and_no_order():
    render = DEMO["render_still_clip"]
    left, right = (
        np.stack([render(name, [k, i], 40, 16) for i in range(50)]) for k, name in enumerate(["left", "right"])
    )

    def in_the_left_half(clips):  # share of frames whose shape, brighter than the scene, has its centre there
        columns = clips.astype(float).mean((2, 4))  # (N, T, 16)
        return (np.sort(columns[..., :8])[..., 4:].sum(-1) > np.sort(columns[..., 8:])[..., 4:].sum(-1)).mean(0)

    at = in_the_left_half(left), in_the_left_half(right)  # by index
    assert 0.65 < at[0].mean() < 0.85 and 0.15 < at[1].mean() < 0.35  # half of the frames anywhere: 0.75 and 0.25
    assert all(np.ptp(share) < 0.5 for share in at)  # no index tells more than another


def test_the_task_decides_the_classes(tmp_path):
    arguments = DEMO["Arguments"](str(tmp_path), task="stills", num_frames=6, image_size=16)
    first, second = (DEMO["make_clip"](1, 3, label, arguments) for label in (0, 1))
    assert not np.array_equal(first[::-1], second)
    assert {path.name for path in (tmp_path / "test").iterdir()} == {"left", "right"}


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="'jumps'.*slides_right"):
        render_clip("jumps", 0)
    with pytest.raises(ValueError, match="'jumps'.*looking_up"):
        DEMO["render_still_clip"]("jumps", 0)


def test_images_show_what_they_are_labelled_with():
    """The shape of 'appears' stands out in proportion to the opacity that comes with the image."""
    correlations = []
    for seed in range(40):
        images, pair, opacity = DEMO["render_images"](seed, 16, 32)
        assert images.shape == (16, 32, 32, 3) and opacity.shape == (16,)
        if PAIRS[pair] == ("appears", "disappears"):
            correlations.append(np.corrcoef(images.mean((1, 2, 3)), opacity)[0, 1])
    assert len(correlations) >= 4 and min(correlations) > 0.95


def test_codec_does_not_know_the_order(tmp_path):
    frames = render_clip("turns_clockwise", 3, num_frames=7, size=32)
    DEMO["write_video"](tmp_path / "forwards.mp4", frames)
    DEMO["write_video"](tmp_path / "backwards.mp4", frames[::-1])
    forwards, backwards = (DEMO["read_video"](tmp_path / f"{name}.mp4") for name in ("forwards", "backwards"))
    np.testing.assert_array_equal(forwards[::-1], backwards)
    assert np.abs(forwards.astype(int) - frames).mean() < 8  # of 255; most of it is noise in the colours


def test_ridge_regression_learns_what_there_is_and_no_more():
    rng = np.random.default_rng(0)
    classes = np.tile(np.arange(8), 30)
    is_train = np.arange(240) < 160
    noise = rng.normal(size=(240, 20))
    seen = noise.copy()
    seen[np.arange(240), classes // 2] += 10  # tells the pair, not the order
    test = classes[~is_train]
    of_class, of_order = DEMO["accuracy"](DEMO["ridge_scores"](seen, classes, is_train), test)
    assert 30 < of_class < 70 and 30 < of_order < 70
    seen[np.arange(240), 8 + classes % 2] += 10
    seen[np.arange(240), 10 + classes] += 10
    assert min(DEMO["accuracy"](DEMO["ridge_scores"](seen, classes, is_train), test)) == 100
    assert DEMO["accuracy"](DEMO["ridge_scores"](noise, classes, is_train), test)[0] < 30


def run_script(folder, *extra):
    sizes = ["--num_train", "5", "--num_test", "1", "--image_size", "16", "--num_frames", "4"]
    status, out, error = run_in_a_fork(SCRIPT, "--output_dir", folder, *sizes, *extra, imported=ALL)
    assert status == 0, error
    return out


def test_command_line(tmp_path):
    printed = run_script(tmp_path)
    assert "one frame, mean over the 4 indices" in printed
    files = sorted(tmp_path.rglob("*.mp4"))
    places = [f"train/{{}}/00{i}.mp4" for i in range(5)] + ["test/{}/000.mp4"]
    wanted = {place.format(name) for place in places for name in CLASSES}
    assert {str(file.relative_to(tmp_path)) for file in files} == wanted
    content = [file.read_bytes() for file in files]
    assert len(set(content)) == len(content)
    assert DEMO["read_video"](files[0]).shape == (4, 16, 16, 3)

    assert run_script(tmp_path) == printed
    assert [file.read_bytes() for file in files] == content


@pytest.mark.parametrize("name, value", [("num_train", 1), ("num_frames", 1), ("image_size", 31)])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}.*give"):
        DEMO["Arguments"]("folder", **{name: value})


def test_pretrained_tower_loads_and_is_the_same_again(tmp_path):
    for name in ("first", "second"):
        script = SCRIPT.with_name("pretrain_demo_tower.py")
        flags = ("--output_dir", tmp_path / name, "--num_scenes", "4", "--num_epochs", "1", "--batch_size", "32")
        status, out, error = run_in_a_fork(script, *flags, imported=ALL, OMP_NUM_THREADS="1")
        assert status == 0, error
        assert "of the classes" in out
    first, second = (CLIPVisionModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert (first.config.hidden_size, first.config.num_hidden_layers, first.config.image_size) == (96, 4, 32)
    assert all(value.equal(second.state_dict()[name]) for name, value in first.state_dict().items())


def test_record_of_the_demo_collects_seeds(tmp_path):
    write_record = runpy.run_path(str(SCRIPT.with_name("report_demo.py")))["write_record"]
    path = tmp_path / "results" / "demo.json"
    write_record(path, "1", {"Naive": 0.5, "InTI": 1.0}, 200)
    write_record(path, "0", {"Naive": 0.25, "InTI": 0.985}, 200)
    record = json.loads(path.read_text())
    assert record["command"].startswith("make demo SEED=0 RECORD=")
    assert record["seeds"]["1"]["top1"]["InTI"] == 1 and record["seeds"]["0"]["num_videos"] == 200
    lines = path.with_suffix(".md").read_text().splitlines()[:4]
    head, _, naive, inti = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert head == ["top-1", "SEED=0", "SEED=1"]
    assert (naive, inti) == (["Naive", "25.0%", "50.0%"], ["InTI", "98.5%", "100.0%"])
