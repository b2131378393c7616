"""Draw what a compression does to a video.

    python scripts/visualize.py outputs/k400/best clip.mp4 --output figure4.png

InTI and LinearPooling as the InTI paper's Figure 4: input frames, the weights of their patches as heat maps (multiplied
over the stages), the aggregated frames. ToMe and STA: each frame, and what is left of it, a patch drawn as the mean of
those in its token and white where it was dropped.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from hf_inti.training.cli import parse_arguments, run_script
from hf_inti.training.weights import load_weights
from hf_inti.visualization import draw_compression


@dataclass
class VisualizationArguments:
    model: str = field(metadata={"help": "A trained model: a folder or a name on the Hub."})
    video: str = field(metadata={"help": "A file or URL."})
    output: str = field(default="figure4.png", metadata={"help": "The picture to write, PNG."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames sampled; default: as in training."})


def main() -> None:
    args = parse_arguments(VisualizationArguments, ["model", "video"], description=__doc__)
    model = load_weights(InTIClipForVideoClassification, args.model).eval()
    processor = InTIClipVideoProcessor.from_pretrained(args.model)
    frames = processor(args.video, num_frames=args.num_frames, do_rescale=False, do_normalize=False)["pixel_values"]
    with torch.inference_mode():
        out = model(
            processor.rescale_and_normalize(frames), output_interpolation_weights=True, output_token_source=True
        )
    score, label = out.logits.softmax(-1)[0].max(-1)
    title = f"{Path(args.video).name}: {model.config.id2label[label.item()]} ({score:.0%})"
    if not draw_compression(out, frames[0] / 255, model.config.patch_size, Path(args.output), title):
        raise ValueError(f"there is nothing to draw: no picture exists of compression {model.config.compression!r}.")
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    run_script(main)
