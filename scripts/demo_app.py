"""A page on which one uploads or picks a clip and sees what a trained model makes of it.

    python scripts/demo_app.py outputs/k400/best

It shows the likeliest classes, a picture of what the compression does to the clip, what the model costs beside Naive
(the same tower on every frame), and how long the answer took. The page asks nothing of other servers: scripts are
Gradio's own copies, and its analytics are off. Needs the extra [demo]; scripts/space makes it a Hugging Face Space.
"""

import html
import io
import logging
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from make_demo_data import render_clip, write_video
from PIL import Image

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig, VideoDecodingError
from hf_inti.data.layouts import VIDEO_EXTENSIONS
from hf_inti.hub.handler import Decoder
from hf_inti.measure.costs import Cost, count_costs
from hf_inti.training.cli import parse_arguments, run_script
from hf_inti.training.weights import load_weights
from hf_inti.visualization import draw_compression


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
    from fastapi import HTTPException
except ImportError as error:
    raise SystemExit(f"error: the page needs gradio ({error}); install the extra: pip install -e '.[demo]'") from error


RENDERED = {"slides_right": 12, "turns_clockwise": 4, "opens": 3, "appears": 5}  # class of make_demo_data.py: seed
HINT = '<p class="note">The answer will be here.</p>'
CSS = """
footer { display: none !important; }
.html-container { padding: 0 !important; overflow-wrap: anywhere; }
.bars { display: grid; gap: 0.7rem; margin: 0; padding: 0; list-style: none; }
.bars li { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0.2rem 1rem; margin: 0; }
.bars li:first-child .label { font-weight: bold; }
.bars .track { flex-basis: 100%; height: 0.5rem; background: var(--border-color-primary); }
.bars .fill { height: 100%; min-width: 2px; background: var(--color-accent); }
.note { opacity: 0.75; margin: 0.75rem 0 0; }
.wrong { padding: 0.75rem 1rem; border-left: 4px solid #d92d20; background: var(--background-fill-secondary); }
/* Trimming would load ffmpeg from a CDN. */
#clip button[aria-label^="Trim"], #clip button[aria-label^="Reset"] { display: none; }
#picture img { width: 100%; height: auto; }
@media (max-width: 640px) {  /* frames stay large enough to see: the picture scrolls inside its own box */
  #picture .image-frame { overflow-x: auto; justify-content: start; }
  #picture img { width: 46rem; max-width: none; }
  .gallery-item .container { width: 4.25rem; height: 4.25rem; }
}
"""


@dataclass
class DemoArguments:
    model: str = field(metadata={"help": "A trained model: a folder or a name on the Hub."})
    host: str = field(default="127.0.0.1", metadata={"help": "The address to listen at; 0.0.0.0 is all of them."})
    port: int = field(default=7860, metadata={"help": "The port to listen at."})
    examples: str | None = field(default=None, metadata={"help": "A folder of clips to offer; default: rendered ones."})
    max_megabytes: int = field(default=50, metadata={"help": "Larger uploads, in MiB, are refused."})
    max_seconds: float = field(default=120.0, metadata={"help": "Longer clips are refused."})
    max_pixels: int = field(default=4096 * 2304, metadata={"help": "Clips with more pixels in a frame are refused."})


class Classifier(NamedTuple):
    model: InTIClipForVideoClassification
    processor: InTIClipVideoProcessor
    cost: Cost  # of one clip
    naive: Cost  # of Naive on the same tower
    decode: Decoder  # another process


def load_classifier(name: str) -> Classifier:
    """Load a folder or a name on the Hub, and try it. Raises ValueError if it is no trained video classifier."""
    model, report = load_weights(InTIClipForVideoClassification, name, output_loading_info=True)
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise ValueError(f"{name} is no trained InTI-CLIP video classifier: {missing} is missing; give one that is.")
    processor = InTIClipVideoProcessor.from_pretrained(name)
    plain = {"compression": "none", "compression_options": {}, "adaptation": "none", "adaptation_options": {}}
    naive = InTIClipVisionConfig.from_dict({**model.config.to_dict(), **plain})
    costs = [count_costs(config, processor.num_frames)["total"] for config in (model.config, naive)]
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    black = torch.zeros(processor.num_frames, 48, 48, 3, dtype=torch.uint8)
    views = {"num_clips": 1, "num_crops": 1, "do_rescale": False, "do_normalize": False}
    classify(model, processor, processor(black, **views)["pixel_values"])  # what does not fit fails now
    script = str(Path(__file__).with_name("demo_clips.py"))  # has no token, so it gets options and no name on the Hub
    return Classifier(model, processor, *costs, Decoder(script, processor.to_json_string()))


def read_clip(classifier: Classifier, path: str, args: DemoArguments) -> torch.Tensor:
    """Frames (1, T, 3, H, W) from 0 to 255.

    Raises VideoDecodingError for what cannot be decoded, and for more bytes, pixels or seconds than `args` allows.
    """
    name = Path(path).name
    if os.path.getsize(path) > args.max_megabytes * 2**20:
        raise VideoDecodingError(f"{name}: larger than {args.max_megabytes} MiB (cut or compress it)")
    limits = {"max_seconds": args.max_seconds, "max_pixels": args.max_pixels}
    try:
        return classifier.decode(Path(path).read_bytes(), name=name, **limits)
    except ValueError as error:
        raise VideoDecodingError(str(error)) from error


def run(classifier: Classifier, path: str, args: DemoArguments) -> tuple:
    """One clip of a video -> frames (T, 3, H, W) in [0, 1], the model's output, seconds to read and to compute."""
    start = time.perf_counter()
    frames = read_clip(classifier, path, args)
    read = time.perf_counter()
    out = classify(classifier.model, classifier.processor, frames)
    return frames[0] / 255, out, (read - start, time.perf_counter() - read)


def classify(model: InTIClipForVideoClassification, processor: InTIClipVideoProcessor, frames: torch.Tensor):
    """The model's output for frames (1, T, 3, H, W) from 0 to 255."""
    with torch.inference_mode():
        pixels = processor.rescale_and_normalize(frames).to(model.device)
        out = model(pixels, output_interpolation_weights=True, output_token_source=True)
    out.logits = out.logits.float().cpu()  # waits for an accelerator
    return out


def draw(classifier: Classifier, frames: torch.Tensor, out) -> tuple[Image.Image, str]:
    """A picture of what the compression does to frames (T, 3, H, W) in [0, 1], and a sentence that explains it."""
    config, file = classifier.model.config, io.BytesIO()
    sentence = draw_compression(out, frames, config.patch_size, file)
    if sentence is None:
        rows = 2 if len(frames) > 8 and len(frames) % 2 == 0 else 1
        pixels = frames.unflatten(0, (rows, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # H, W, 3 of all
        Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(file, "png")
        sentence = f"The {len(frames)} frames seen; compression {config.compression} predicts no weights to draw."
    return Image.open(file), sentence


def bars(rows: list[tuple[str, float, str]]) -> str:
    """HTML of a list: for each (label, share of the full width, value) a bar."""
    items = [
        f'<li><span class="label">{html.escape(label)}</span><span class="value">{value}</span>'
        f'<div class="track"><div class="fill" style="width: {share:.2%}"></div></div></li>'
        for label, share, value in rows
    ]
    return f'<ul class="bars">{"".join(items)}</ul>'


def answer_bars(classifier: Classifier, logits: torch.Tensor) -> str:
    """HTML: the five likeliest labels with their probabilities, of logits (K,)."""
    best = logits.softmax(-1).topk(min(5, len(logits)))
    names = classifier.model.config.id2label
    return bars([(names[i], p, f"{p:.1%}") for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)])


def cost_bars(classifier: Classifier) -> str:
    """HTML: multiply-adds and parameters, this model's and Naive's."""
    costs = {"This model": classifier.cost, "Naive": classifier.naive}
    most = max(cost.macs for cost in costs.values())
    rows = [(name, c.macs / most, f"{c.gmacs:.4g} GMACs, {c.mparams:.4g} M parameters") for name, c in costs.items()]
    share, frames = classifier.cost.macs / classifier.naive.macs, classifier.processor.num_frames
    note = f"Multiply-adds of {frames} frames. Naive is the same tower on each frame; this model computes {share:.0%}."
    return f'{bars(rows)}<p class="note">{note}</p>'


def refuse_urls() -> None:
    """Have gradio fetch no URL: it would for any client that names one, as a clip of any size, or to hand it on."""
    message = "The clip must be uploaded, got a URL; upload the file."

    async def refuse_clip(url: str) -> None:
        raise gr.Error(message)

    async def refuse_request(url: str, request: object) -> None:
        raise HTTPException(403, message)

    gr.processing_utils.async_ssrf_protected_get = refuse_clip
    gr.routes.secure_url_stream_response = refuse_request


def build_page(classifier: Classifier, examples: list[Path], args: DemoArguments) -> gr.Blocks:
    """The page, not yet served; `args` gives the limits and the name."""
    config = classifier.model.config
    # A folder is not named: visitors need not know where on the server the model lies.
    title = "InTI-CLIP" if Path(args.model).exists() else args.model
    about = f"Compression {config.compression}, adaptation {config.adaptation}, {config.num_labels} classes."

    def show(path):
        try:
            if path is None:
                return HINT, gr.update(visible=False), None, ""
            frames, out, (read, ran) = run(classifier, path, args)
            labels = answer_bars(classifier, out.logits[0])
            labels += f'<p class="note">Read in {read:.2f} s, classified in {ran:.2f} s on this server.</p>'
            return labels, gr.update(visible=True), *draw(classifier, frames, out)
        except VideoDecodingError as error:
            message = str(error)
        except Exception:
            logging.exception("a clip could not be classified")
            message = "Something went wrong on the server. Please try another clip."
        return f'<p class="wrong" role="alert">{html.escape(message)}</p>', gr.update(visible=False), None, ""

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {title}\nUpload a clip or pick an example. {about}")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Clip", sources=["upload"], height=320, elem_id="clip")
                gr.Examples([[str(path)] for path in examples], [video], elem_id="examples")
            with gr.Column():
                gr.Markdown("### Answer")
                answer = gr.HTML(HINT, elem_id="answer")
                gr.Markdown("### Cost")
                gr.HTML(cost_bars(classifier), elem_id="costs")
        with gr.Column(visible=False) as result:
            gr.Markdown("### What the model does to the clip")
            picture = gr.Image(show_label=False, format="png", buttons=["fullscreen"], elem_id="picture")
            sentence = gr.Markdown(elem_id="sentence")
        shown = [answer, result, picture, sentence]
        video.change(show, [video], shown, show_progress_on=[answer], api_visibility="private")
    return page


def find_examples(folder: str) -> list[Path]:
    """The videos in a folder. Raises ValueError where there are none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS)
    if not found:
        raise ValueError(f"{folder} holds no videos; looked for files ending in {', '.join(VIDEO_EXTENSIONS)}.")
    return found


def serve(args: DemoArguments) -> None:
    """Load the model and serve the page until the process ends."""
    classifier = load_classifier(args.model)
    classifier.decode.start()
    refuse_urls()
    theme = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"])
    with tempfile.TemporaryDirectory() as rendered:
        if args.examples is None:
            for name, seed in RENDERED.items():
                write_video(Path(rendered, f"{name}.mp4"), render_clip(name, seed, size=240))
        page = build_page(classifier, find_examples(args.examples or rendered), args)
        page.launch(
            server_name=args.host, server_port=args.port, share=False, ssr_mode=False,
            max_file_size=args.max_megabytes * 2**20, theme=theme, css=CSS, footer_links=[],
        )  # fmt: skip


if __name__ == "__main__":
    run_script(lambda: serve(parse_arguments(DemoArguments, ["model"], description=__doc__)))
