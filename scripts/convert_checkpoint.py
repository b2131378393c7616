"""Turn the authors' published weights of UniFormerV2, ZeroI2V, AIM or ST-Adapter on CLIP into a saved model.

    python scripts/convert_checkpoint.py k400_b16_f8x224.pyth converted/uniformerv2 --num_frames 8 --labels k400.txt

Model and processor are written for from_pretrained. The method, its options and the tower's size are read off the
weights; what weights do not tell (which blocks are read, ZeroI2V's heads and scale, AIM's scale) can be given.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.papers.conversion import METHODS, convert_state_dict, detect_adaptation, infer_config, strip_prefix
from hf_inti.training.cli import parse_arguments, run_script


CONTAINERS = ("state_dict", "model_state", "model")  # under which the authors' files hold the weights
NORMALISATION = {"uniformerv2": {"image_mean": [0.45] * 3, "image_std": [0.225] * 3}}  # the others': CLIP's


@dataclass
class ConversionArguments:
    checkpoint: str = field(metadata={"help": "A released file: .pth, .pyth, .pt or .safetensors."})
    output_dir: str = field(metadata={"help": "Folder for the converted model and its processor."})
    adaptation: str | None = field(default=None, metadata={"help": f"{', '.join(METHODS)}; default: told by names."})
    adaptation_options: dict | None = field(default=None, metadata={"help": "What the weights do not tell (JSON)."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames trained on, unless an embedding tells."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Default: 64 wide, as CLIP's are."})
    labels: str | None = field(default=None, metadata={"help": "A file of class names, one a line, in their order."})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a released file; nothing but tensors is unpickled. Raises ValueError for another file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: no zip, no pickle, or objects that weights_only refuses
        raise ValueError(f"{path} holds no plain weights that can be read ({type(error).__name__}).") from error
    for name in CONTAINERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no state dict, neither itself nor under {', '.join(CONTAINERS)}.")
    return loaded


def main() -> None:
    args = parse_arguments(ConversionArguments, ["checkpoint", "output_dir"], description=__doc__)
    released = strip_prefix(read_weights(Path(args.checkpoint)))
    method = args.adaptation or detect_adaptation(released)
    if method not in METHODS:
        raise ValueError(f"adaptation must be one of {', '.join(METHODS)}, got {method!r}.")
    fields = infer_config(released, method, args.num_frames)
    fields["adaptation_options"].update(args.adaptation_options or {})
    if args.num_attention_heads:
        fields["num_attention_heads"] = args.num_attention_heads
    has_head = "num_labels" in fields
    if args.labels:
        names = Path(args.labels).read_text().split("\n")
        names = [name.strip() for name in names if name.strip()]
        if len(names) != fields.get("num_labels", len(names)):
            raise ValueError(f"{args.labels} names {len(names)} classes, the head has {fields['num_labels']}.")
        fields["id2label"], fields["label2id"] = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        fields.pop("num_labels", None)
    config = InTIClipVisionConfig(**fields)
    model = InTIClipForVideoClassification(config)
    missing, unexpected = model.load_state_dict(convert_state_dict(released, method), strict=False)
    # UniFormerV2 has no use for CLIP's last LayerNorm, and the other methods' files may be without a head.
    allowed = ("vision_model.post_layernorm.",) if method == "uniformerv2" else ()
    allowed += () if has_head else ("classifier.",)
    wrong = unexpected + [name for name in missing if not name.startswith(allowed)]
    if wrong:
        raise ValueError(f"the weights do not make a whole {method} model, as at {wrong[0]}; give adaptation_options.")
    model.save_pretrained(args.output_dir)
    size = config.image_size
    InTIClipVideoProcessor(
        num_frames=config.num_frames,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **NORMALISATION.get(method, {}),
    ).save_pretrained(args.output_dir)
    head = "" if has_head else "without a head (a new one was made)"
    print(f"{method} {fields['adaptation_options']} {head}\nThe model is in {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
