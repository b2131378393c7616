"""From video files to pixel values, compared with other decoders.

Every contestant reads the same 16 frames, evenly spaced, and makes pixel values of them, float32 (16, 3, 224, 224):

- hf_inti: `InTIClipVideoProcessor`;
- pyav: PyAV from the start of the file to the last frame wanted, with its own defaults, then CLIPImageProcessor;
- pyav_threads: that with as many threads as FFmpeg likes; pyav_resize: that with our resizing in the place of CLIP's;
- load_video: that of transformers with its backend pyav, then CLIPImageProcessor;
- torchcodec (exact) and torchcodec_approximate, decord: their frames in one batch, then our resizing, with one thread
  and (_threads) with as many as torch has. What is not installed is left out.
"""

import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import is_torchvision_available
from transformers.video_utils import load_video

from ..measure.jobs import Job, read_json, run_jobs, write_json
from ..measure.memory import held, peak, reset_peak
from ..measure.tables import markdown_table
from ..measure.timing import TimingArguments, interleave, report, summary
from ..model.video_processing_inti_clip import InTIClipVideoProcessor, crop, sample_indices
from ..training.cli import parse_recipe, run_script


RATE = 30  # frames a second
ENCODED_SECONDS = 10  # longer clips are these again and again
CLIPS = ["340x256,12", "340x256,250", "1280x720,12", "1280x720,250"]
SAME_FRAME = 1.0  # grey levels: ways to resize differ by less on average, neighbouring frames by more


def pictures(num_frames: int, width: int, height: int) -> Iterator[np.ndarray]:
    """A textured scene that the camera sweeps, with things that move in front of it and grain, uint8 (H, W, 3).

    At 30 frames a second libx264 makes 0.3 to 0.5 Mbit/s of it at 340 x 256, and 2 to 4 at 1280 x 720.
    """
    rng = np.random.default_rng(0)
    scene = np.zeros((2 * height, 2 * width, 3), np.float32)
    for octave in range(1, 8):  # ever coarser and stronger, as in nature
        size = 2**octave
        shape = (2 * height // size + 2, 2 * width // size + 2, 3)
        coarse = torch.from_numpy(rng.normal(0, size**0.9, shape).astype(np.float32)).permute(2, 0, 1)[None]
        fine = F.interpolate(coarse, size=scene.shape[:2], mode="bilinear")
        scene += fine[0].permute(1, 2, 0).numpy()
    scene = (255 * (scene - scene.min()) / np.ptp(scene)).astype(np.uint8)
    grain = rng.integers(-7, 8, (height + 64, width + 64, 1), dtype=np.int16)
    side = height // 3
    for t in range(num_frames):
        top, left = int(height / 2 * (1 + 0.8 * np.sin(t / 70))), int(width / 2 * (1 + 0.8 * np.sin(t / 50)))
        frame = scene[top : top + height, left : left + width].astype(np.int16)
        for k in range(3):
            top = int((height - side) / 2 * (1 + np.sin(t / 20 + k)))
            left = int((width - side) / 2 * (1 + np.cos(t / (15 + 4 * k) + 2 * k)))
            frame[top : top + side, left : left + side] = scene[k * side :, k * side :][:side, :side][::-1]
        top, left = rng.integers(0, 64, 2)
        yield (frame + grain[top : top + height, left : left + width]).clip(0, 255).astype(np.uint8)


def make_clip(path: Path, seconds: int, width: int, height: int, key_frame_distance: int) -> Path:
    """Write an H.264 file of `pictures`, by libx264 with its defaults but for `key_frame_distance`, in frames.

    At scene changes there are no further key frames: long distances are what is hard to decode in parts.
    """
    part = path.with_suffix(".part.mp4")
    packets = []
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(key_frame_distance), "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_type = "FRAME"  # PyAV's own default makes several slices of each frame
        for picture in pictures(RATE * min(seconds, ENCODED_SECONDS), width, height):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode(None)
        length = round(Fraction(min(seconds, ENCODED_SECONDS)) / packets[0].time_base)
        times = [(packet.pts, packet.dts) for packet in packets]
        for repeat in range(max(1, seconds // ENCODED_SECONDS)):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = pts + repeat * length, dts + repeat * length
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                container.mux(copy)
    return part.rename(path)


def _indices(total: int) -> list[int]:
    return sample_indices(total, num_frames=InTIClipVideoProcessor.num_frames)


def _clip_processor():
    """CLIP's processor as transformers would choose it: with torchvision if that is there, else with Pillow."""
    return CLIPImageProcessor() if is_torchvision_available() else CLIPImageProcessorPil()


def decoding_contestants(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """The contestants that are installed, each making pixel_values (16, 3, 224, 224) from the clip's file."""
    path, threads = str(path), torch.get_num_threads()
    ours, clips = InTIClipVideoProcessor(), _clip_processor()

    def finish(frames: torch.Tensor) -> torch.Tensor:  # (T, H, W, 3) uint8, all at once
        height, width = frames.shape[1:3]
        short = ours.size.shortest_edge
        size = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        frames = F.interpolate(frames.permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True)
        return ours.rescale_and_normalize(crop(frames, ours.crop_size.height, ours.crop_size.width))

    def in_order(thread_type: str | None, finish: Callable) -> torch.Tensor:
        with av.open(path) as container:
            stream = container.streams.video[0]
            if thread_type is not None:
                stream.thread_type = thread_type
            wanted, frames = _indices(stream.frames), []
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if index == wanted[-1]:
                    return finish(frames)
        raise ValueError(f"{path} has fewer frames than its header says; benchmark on another clip.")

    def by_clip(frames) -> torch.Tensor:
        return clips(list(frames), return_tensors="pt")["pixel_values"]

    def by_transformers() -> torch.Tensor:
        frames, _ = load_video(path, sample_indices_fn=lambda metadata, **_: _indices(metadata.total_num_frames))
        return by_clip(frames)

    contestants = {
        "hf_inti": lambda: ours(path)["pixel_values"][0],
        "pyav": lambda: in_order(None, by_clip),
        "pyav_threads": lambda: in_order("AUTO", by_clip),
        "pyav_resize": lambda: in_order("AUTO", lambda frames: finish(torch.from_numpy(np.stack(frames)))),
        "load_video": by_transformers,
    }
    if "torchcodec" not in missing_decoders():
        from torchcodec.decoders import VideoDecoder

        def by_torchcodec(mode: str, threads: int) -> torch.Tensor:
            decoder = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=threads, dimension_order="NHWC")
            return finish(decoder.get_frames_at(_indices(len(decoder))).data)

        contestants |= {
            "torchcodec": lambda: by_torchcodec("exact", 1),
            "torchcodec_threads": lambda: by_torchcodec("exact", threads),
            "torchcodec_approximate": lambda: by_torchcodec("approximate", 1),
            "torchcodec_approximate_threads": lambda: by_torchcodec("approximate", threads),
        }
    if "decord" not in missing_decoders():
        import decord

        def by_decord(threads: int) -> torch.Tensor:
            reader = decord.VideoReader(path, num_threads=threads)
            return finish(torch.from_numpy(reader.get_batch(_indices(len(reader))).asnumpy()))

        contestants |= {"decord": lambda: by_decord(1), "decord_threads": lambda: by_decord(threads)}
    return contestants


def missing_decoders() -> dict[str, str]:
    """Of torchcodec and decord those that cannot be imported, each with the reason in one line."""
    missing = {}
    for name in ("torchcodec.decoders", "decord"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg is a RuntimeError
            missing[name.partition(".")[0]] = " ".join(str(error).split())[:80]
    return missing


def agreement(contestants: dict[str, Callable[[], torch.Tensor]]) -> dict[str, dict]:
    """How far each is from `pyav`: `same_frames`, how many frames are the same, and `difference`, the largest mean
    difference of one of those in grey levels.

    Raises ValueError where hf_inti's frames are not the same.
    """
    std = 255 * torch.tensor(InTIClipVideoProcessor.image_std).view(-1, 1, 1)
    wanted, found = contestants["pyav"](), {}
    for name, contestant in contestants.items():
        distance = ((contestant() - wanted) * std).abs().mean((1, 2, 3))
        same = distance < SAME_FRAME
        found[name] = {"same_frames": int(same.sum()), "difference": distance[same].max().item() if any(same) else None}
    if found["hf_inti"]["same_frames"] < len(wanted):
        raise ValueError(f"hf_inti gives {found['hf_inti']['same_frames']} of {len(wanted)} frames as PyAV does.")
    return found


def measure_clips(clips: dict[str, Path], repetitions: int) -> tuple[dict[str, dict], list[str]]:
    """Rows by `CONTESTANT@CLIP`, and a sentence on each contestant that is missing or gives other frames."""
    notes = [f"{name} is left out: {reason}." for name, reason in missing_decoders().items()]
    rows = {}
    for clip, path in clips.items():
        contestants = decoding_contestants(path)
        found = agreement(contestants)
        for name, row in found.items():
            if row["same_frames"] < InTIClipVideoProcessor.num_frames:
                notes.append(f"{name} gives other frames of {clip}: {row['same_frames']} are the same.")
        times = interleave(contestants, repetitions, clip)
        rows |= {f"{name}@{clip}": {**row, **summary(times[name])} for name, row in found.items()}
    return rows, notes


def by_clip(rows: dict[str, dict], clips: Iterable[str]) -> str:
    """A table of milliseconds: a line for each contestant, a column for each clip."""
    names = dict.fromkeys(row.partition("@")[0] for row in rows)
    lines = [[name, *(f"{1e3 * rows[f'{name}@{clip}']['seconds']:.0f}" for clip in clips)] for name in names]
    return markdown_table(["ms", *clips], lines)


def measure_memory(path: Path, warm_up: Path) -> dict:
    """In a process of its own: what the processor takes at most for one clip, after a tiny one loaded all code."""
    processor = InTIClipVideoProcessor()
    processor(warm_up)
    gc.collect()
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = held(cpu)
    begin = time.perf_counter()
    processor(path)
    seconds = time.perf_counter() - begin
    most = peak(cpu)
    return {"seconds_once": seconds, "peak_memory_bytes": None if None in (before, most) else most - before}


def memory_of_lengths(folder: Path, lengths: list[int], threads: int) -> dict[str, dict]:
    """Rows of `measure_memory` by `SECONDSs`, of clips of 340 x 256 with key frames 250 apart."""
    warm_up = make_clip(folder / "warm_up.mp4", 1, 64, 48, 250)
    jobs = []
    for seconds in lengths:
        path = make_clip(folder / f"{seconds}s.mp4", seconds, 340, 256, 250)
        output = folder / f"memory_{seconds}s.json"
        output.unlink(missing_ok=True)
        arguments = ["hf_inti.benchmarks.decoding", str(output), str(path), str(warm_up)]
        jobs.append(Job(f"{seconds}s", arguments, folder / "memory_log.txt", output))
    run_jobs(jobs, 1, threads, "Memory", lambda job, seconds: f"{job.name}: measured")
    return {job.name: read_json(job.output) for job in jobs}


@dataclass
class DecodingArguments(TimingArguments):
    """What is decoded."""

    clips: list[str] = field(
        default_factory=lambda: list(CLIPS),
        metadata={"help": "Video files, or WIDTHxHEIGHT,DISTANCE of key frames for 10 seconds that are made."},
    )
    lengths: list[int] = field(
        default_factory=lambda: [10, 600], metadata={"help": "Seconds of clips whose peak memory is measured too."}
    )

    def __post_init__(self):
        super().__post_init__()
        for clip in self.clips:
            size, _, distance = clip.partition(",")
            width, _, height = size.partition("x")
            if not Path(clip).is_file() and not all(part.isdecimal() for part in (width, height, distance)):
                raise ValueError(f"clips are files or read WIDTHxHEIGHT,DISTANCE as in {CLIPS[0]}, got {clip!r}.")
        for seconds in self.lengths:
            if seconds < 1 or seconds > ENCODED_SECONDS and seconds % ENCODED_SECONDS:
                raise ValueError(f"lengths are seconds, beyond {ENCODED_SECONDS} multiples of it, got {seconds}.")


def main(arguments: list[str]) -> int:
    """`benchmark.py decoding`. Raises ValueError for settings that do not fit and frames of ours that are wrong."""
    args = parse_recipe([DecodingArguments], arguments, description=__doc__)[0]
    args.pin_threads()
    with tempfile.TemporaryDirectory() as scratch:
        clips = {}
        for clip in args.clips:
            if Path(clip).is_file():
                clips[Path(clip).stem.replace(" ", "_")] = Path(clip)
            else:
                width, height, distance = map(int, clip.replace("x", ",").split(","))
                name = f"{width}x{height}_{distance}"
                clips[name] = make_clip(Path(scratch) / f"{name}.mp4", ENCODED_SECONDS, width, height, distance)
        rows, notes = measure_clips(clips, args.repetitions)
        overview = by_clip(rows, clips)
        rows |= memory_of_lengths(Path(scratch), args.lengths, torch.get_num_threads())
    about = f"16 frames to normalised pixels; CLIP's processor is {type(_clip_processor()).__name__}. {' '.join(notes)}"
    return report("Decoding", rows, args, about.strip(), overview=overview)


if __name__ == "__main__":  # as memory_of_lengths starts it
    target, *paths = sys.argv[1:]
    run_script(lambda: write_json(Path(target), measure_memory(*map(Path, paths))))
