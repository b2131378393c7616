"""Render the demo dataset: eight classes of short clips that only the ORDER of their frames tells apart.

    python scripts/make_demo_data.py --output_dir demo_data
    python scripts/make_demo_data.py --output_dir demo_stills --task stills

Each of the four PAIRS moves one attribute of a bright shape: where it is (the frame wraps around), the angle
at which its mouth points, how far the mouth is open, how opaque it is. The attribute starts anywhere, runs
upwards and wraps from its end to its beginning; the second class of a pair is the first one played backwards.
Hence:

* at every index t the moving attribute of a single frame is uniform in both classes of a pair, and all else
  is drawn alike, so that a single frame tells at best the pair;
* a clip of the one class played backwards is a clip of the other, so that a set of frames without their order
  tells at best the pair: a model that ignores order is right at most half of the time. Test clips come in twos that
  are each other played backwards, so that this half is exact and not a matter of luck. (To be sampled alike in both
  directions, 24 frames are three for each of the eight that a model sees.)

Each frame is written as an H.264 key frame at a constant quantiser: coded by itself, so that the codec, whose
predicted frames differ from key frames and lean on the past, cannot give the order away.

The task "stills" is the opposite: the same scenes, eight classes told apart by what single frames show, in any order.
The attribute of each pair lies in the one half of its range or the other, anew in each frame; half of the frames are
strays, which show anything.

Letters: T frames, H = W = size in pixels, N clips, K classes, F features.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map
from transformers import HfArgumentParser


PAIRS = [
    ("slides_right", "slides_left"),
    ("turns_clockwise", "turns_counterclockwise"),
    ("opens", "closes"),
    ("appears", "disappears"),
]
CLASSES = [name for pair in PAIRS for name in pair]
STILLS = [("left", "right"), ("looking_down", "looking_up"), ("narrow", "wide"), ("faint", "solid")]
STILL_CLASSES = [name for pair in STILLS for name in pair]
STRAYS = 0.5  # share of the frames that show anything
MOVING = ["position", "angle", "mouth", "opacity"]  # the attribute that each pair moves through [0, 1)
SHAPES = ["disc", "square", "diamond"]
SHAPES_OF_PAIR = [SHAPES, ["disc"], SHAPES, SHAPES]  # only on a disc is the mouth all that turns
RESTING = [  # from where each pair draws the attributes that stay: sides of the frame, turns, shares, shares
    {"angle": (0, 1), "mouth": (0, 0), "opacity": (1, 1)},
    {"position": (0.44, 0.56), "mouth": (0.5, 0.65), "opacity": (1, 1)},
    {"position": (0.44, 0.56), "angle": (-0.1, 0.1), "opacity": (1, 1)},
    {"position": (0.44, 0.56), "angle": (0, 1), "mouth": (0, 0)},
]
FPS = 12


def shape_distance(dx, dy, shape):
    """Distance from the centre of a shape that is as large as a disc of that radius, about."""
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) * 1.13
    if shape == "diamond":
        return (np.abs(dx) + np.abs(dy)) / 1.25
    return np.hypot(dx, dy)


def smooth_noise(rng, cells, size):
    """Random numbers on a grid of cells x cells, linearly enlarged to (size, size, 3): a cloudy texture."""
    at = np.linspace(0, cells - 1, size)
    weights = np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, None)  # (size, cells)
    return (weights @ rng.uniform(-1, 1, (3, cells, cells)) @ weights.T).transpose(1, 2, 0)


def draw(rng, pair, moving, size):
    """One shape before one scene, both drawn from `rng`, for each value of the attribute that the pair moves.

    moving: (T,) in [0, 1). Returns uint8 (T, size, size, 3). Lengths are in sides of the frame. The noise of
    the pixels is drawn for each frame.
    """
    pixel = (np.arange(size) + 0.5) / size
    x, y = pixel[None, :], pixel[:, None]
    scene = rng.uniform(0.1, 0.4, 3) + 0.08 * smooth_noise(rng, 4, size) + 0.05 * smooth_noise(rng, 9, size)
    for _ in range(3):  # distractors: small, still, behind the shape
        (centre_x, centre_y), radius = rng.uniform(0, 1, 2), rng.uniform(0.04, 0.08)
        distance = shape_distance(x - centre_x, y - centre_y, rng.choice(SHAPES))
        mask = np.clip((radius - distance) * size + 0.5, 0, 1)[..., None]  # edges one pixel wide
        scene = scene + mask * (rng.uniform(0.1, 0.8, 3) - scene)

    at = {name: rng.uniform(low, high) for name, (low, high) in RESTING[pair].items()}
    at[MOVING[pair]] = moving[:, None, None]
    colour, shape = rng.uniform(0.6, 1, 3), rng.choice(SHAPES_OF_PAIR[pair])
    radius, centre_y = rng.uniform(0.28, 0.36), rng.uniform(0.44, 0.56)
    dx, dy = (x - at["position"] + 0.5) % 1 - 0.5, y - centre_y
    cos, sin = np.cos(2 * np.pi * at["angle"]), np.sin(2 * np.pi * at["angle"])
    along, across = dx * cos + dy * sin, dy * cos - dx * sin  # in the shape's own directions
    inside = radius - shape_distance(along, across, shape)
    beside_mouth = np.abs(np.arctan2(across, along)) - 0.8 * np.pi * at["mouth"]
    inside = np.where(at["mouth"] > 0, np.minimum(inside, beside_mouth * np.hypot(along, across)), inside)
    mask = np.clip(inside * size + 0.5, 0, 1) * (0.1 + 0.9 * at["opacity"])  # (T, H, W)
    frames = scene + mask[..., None] * (colour - scene)
    frames = frames + rng.normal(0, 0.03, frames.shape)
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def render_clip(class_name, seed, num_frames=24, size=48):
    """One clip of a class: uint8 (num_frames, size, size, 3).

    seed: what `numpy.random.default_rng` takes, a Generator too. From the same integer the second class of a
    pair gives exactly the frames of the first, backwards. Raises ValueError for an unknown class.
    """
    if class_name not in CLASSES:
        raise ValueError(f"Unknown class {class_name!r}: choose one of {', '.join(CLASSES)}.")
    pair, backwards = divmod(CLASSES.index(class_name), 2)
    rng = np.random.default_rng(seed)
    cycles = rng.uniform(0.6, 0.9)  # in the whole clip: far from half a cycle per frame, where motion aliases
    moving = (rng.uniform() + cycles * np.arange(num_frames) / num_frames) % 1
    frames = draw(rng, pair, moving, size)
    return frames[::-1].copy() if backwards else frames


def render_still_clip(class_name, seed, num_frames=24, size=48):
    """One clip of a class of the task "stills": uint8 (num_frames, size, size, 3).

    seed: what `numpy.random.default_rng` takes. Raises ValueError for an unknown class.
    """
    if class_name not in STILL_CLASSES:
        raise ValueError(f"Unknown class {class_name!r}: choose one of {', '.join(STILL_CLASSES)}.")
    pair, half = divmod(STILL_CLASSES.index(class_name), 2)
    rng = np.random.default_rng(seed)
    anywhere = rng.uniform(0, 1, num_frames)
    stray = rng.uniform(0, 1, num_frames) < STRAYS
    return draw(rng, pair, np.where(stray, anywhere, (half + anywhere) / 2), size)


def render_images(seed, num_images, size=32):
    """Single frames of one scene as the clips show them, and what they show: images to pretrain a tower on.

    Returns the images, uint8 (num_images, size, size, 3), the pair, an index into PAIRS, and the moving
    attribute of each image, (num_images,) in [0, 1).
    """
    rng = np.random.default_rng(seed)
    pair, moving = int(rng.integers(len(PAIRS))), rng.uniform(0, 1, num_images)
    return draw(rng, pair, moving, size), pair, moving


def write_video(path, frames):
    """Write uint8 (T, H, W, 3) frames as H.264, each a key frame; see the top of the file for why."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"qp": "18", "g": "1", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read_video(path):
    """All frames of a short video, uint8 (T, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def ridge_scores(x, classes, is_train):
    """Ridge regression in closed form from x (N, F) to one-hot classes (N,); scores of the rest (N_test, K).

    The strength, in units of the mean eigenvalue, is the best one on every fifth training clip.
    """
    x = x - x[is_train].mean(0)
    products = (x @ x[is_train].T).astype(np.float64)  # (N, N_train): all that ridge regression looks at
    test, products = products[~is_train], products[is_train]
    classes = classes[is_train]
    target = np.eye(len(CLASSES))[classes] - 1 / len(CLASSES)
    held_out = np.arange(len(classes)) % 5 == 0

    def fit(part, strength):
        inner = products[np.ix_(part, part)]
        return np.linalg.solve(inner + strength * np.diag(inner).mean() * np.eye(len(inner)), target[part])

    def held_out_accuracy(strength):
        scores = products[np.ix_(held_out, ~held_out)] @ fit(~held_out, strength)
        return (scores.argmax(1) == classes[held_out]).mean()

    strength = max([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001], key=held_out_accuracy)
    return test @ fit(np.ones(len(classes), bool), strength)


def accuracy(scores, classes):
    """In percent: of the class, and of the order alone, by the scores of the two classes of the true pair."""
    order = scores.reshape(len(scores), -1, 2)[np.arange(len(scores)), classes // 2].argmax(1)
    return np.array([(scores.argmax(1) == classes).mean(), (order == classes % 2).mean()]) * 100


def flow_features(clips):
    """What a linear model can tell order from: products of grey pixels of neighbouring frames, (N, 4096).

    clips: uint8 (N, T, S, S, 3). Exchanging the two frames flips the sign of each feature.
    """
    n, num_frames, size = clips.shape[:3]
    edges = np.linspace(0, size, 9).astype(int)[:-1]
    grey = clips.mean(-1, dtype=np.float32)
    grey = np.add.reduceat(np.add.reduceat(grey, edges, axis=2), edges, axis=3).reshape(n, num_frames, -1)
    grey = grey - grey.mean(1, keepdims=True)  # what stands still tells nothing
    grey = grey / grey.std(axis=(1, 2), keepdims=True)
    forwards = np.einsum("ntf,ntg->nfg", grey[:, :-1], grey[:, 1:], optimize=True)
    return (forwards - forwards.transpose(0, 2, 1)).reshape(n, -1)


def report(clips, classes, is_train):
    """Print what ridge regression makes of the pixels of the written clips, uint8 (N, T, S, S, 3)."""
    test_classes = classes[~is_train]
    num_frames = clips.shape[1]

    def score(x):
        x = x.reshape(len(x), -1).astype(np.float32) / 255
        return accuracy(ridge_scores(x, classes, is_train), test_classes)

    indices = tqdm(range(num_frames), desc="ridge regression", unit="frame")
    frames = np.array([score(clips[:, t]) for t in indices])
    rows = [
        (f"one frame, mean over the {num_frames} indices", *frames.mean(0)),
        ("   lowest index", *frames.min(0)),
        ("   highest index", *frames.max(0)),
        ("mean of all frames", *score(clips.mean(1, dtype=np.float32))),
        ("most that frames without order allow", 50, 50),
        ("products of neighbouring frames", *score(flow_features(clips))),
    ]
    print(f"Ridge regression on pixels, {len(test_classes)} test clips    class   order within the true pair")
    for name, of_class, of_order in rows:
        print(f"{name:<45} {of_class:9.1f}% {of_order:15.1f}%")


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Gets {train,test}/<class>/<number>.mp4."})
    task: str = field(default="order", metadata={"choices": ["order", "stills"], "help": "What tells classes apart."})
    seed: int = field(default=0, metadata={"help": "Another seed gives another dataset."})
    num_train: int = field(default=100, metadata={"help": "Training clips per class."})
    num_test: int = field(default=25, metadata={"help": "Test clips per class."})
    image_size: int = field(default=48, metadata={"help": "Height and width in pixels, even."})
    num_frames: int = field(default=24, metadata={"help": "Frames per clip."})

    def __post_init__(self):
        if min(self.num_train // 2, self.num_test, self.num_frames // 2) < 1:
            raise ValueError(
                f"Got num_train={self.num_train}, num_test={self.num_test}, num_frames={self.num_frames}: "
                "give at least 2 training clips and 1 test clip per class, and 2 frames."
            )
        if self.image_size < 16 or self.image_size % 2:
            raise ValueError(f"Got image_size={self.image_size}: give an even number, 16 or more.")


def make_clip(split, number, label, arguments):
    """Write one clip, 0 <= label < 8, and return it as it was written."""
    stills = arguments.task == "stills"
    classes, render = (STILL_CLASSES, render_still_clip) if stills else (CLASSES, render_clip)
    # No clip shares its draws with another, but for the two test clips that are each other backwards.
    seed = [arguments.seed, split, number, label if split == 0 or stills else label // 2]
    path = Path(arguments.output_dir, ["train", "test"][split], classes[label], f"{number:03d}.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, render(classes[label], seed, arguments.num_frames, arguments.image_size))
    return read_video(path)


def main(arguments):
    todo = [
        (split, number, label)
        for split, count in enumerate([arguments.num_train, arguments.num_test])
        for number in range(count)
        for label in range(len(CLASSES))
    ]
    splits, numbers, labels = np.array(todo).T
    render = partial(make_clip, arguments=arguments)
    clips = process_map(render, splits, numbers, labels, chunksize=8, desc="rendering", unit="clip")
    if arguments.task == "order":
        report(np.stack(clips), labels, splits == 0)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
