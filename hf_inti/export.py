"""Trained models as files that run without this package: ONNX, also with int8 weights, and torch.export programs.

The functions take a model on the CPU in float32. A file takes `pixel_values` (B, T, 3, height, width), float32 as the
processor gives them, and returns `logits` (B, K). B is free; T is the model's number of frames, or free too.
B clips, T frames, K classes.
"""

import json
import logging
import tempfile
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers.modeling_outputs import ImageClassifierOutput

from .model.modeling_inti_clip import InTIClipForVideoClassification
from .model.video_processing_inti_clip import OPTIONS, InTIClipVideoProcessor


TOLERANCE = 1e-4  # largest difference of logits that is put down to rounding
ONE_FILE = 1.9e9  # bytes of weights; protobuf ends at 2 GiB, and larger ones go into a second file
FACTS_FILE = "hf_inti.json"  # inside a .pt2; ONNX has a place for them


def needs(name: str) -> ModuleType:
    """Import one of the packages of the extra "export"; an ImportError says how to get them."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"exporting needs {name} ({error}); install the extra: pip install -e '.[export]'") from error


def frame_counts(model: InTIClipForVideoClassification) -> tuple[int, int]:
    """The least number of frames and the step between numbers, of a file with dynamic frames.

    Raises ValueError for a model that can only be exported with fixed frames.
    """
    config, fixed = model.config, "export it with fixed frames (without dynamic_frames)."
    if config.compression == "sta" or (config.compression == "stts" and model.base_model.compression.temporal):
        raise ValueError(
            f"torch.export fixes the number of frames that compression {config.compression!r} goes through; {fixed}"
        )
    # torch.export takes sizes 0 and 1 for constants. InTI's pooling over time and the shifts of UniFormerV2 and
    # ST-Adapter (by half of its kernel) must not come down to them.
    left = max(3, config.adaptation_options.get("kernel_size", [3])[0] // 2 + 2)
    least = left * config.frame_multiple
    if config.num_frames < least:
        raise ValueError(
            f"with dynamic frames this model could be exported for {least} frames and more, and it was trained on "
            f"{config.num_frames}; {fixed}"
        )
    return least, config.frame_multiple


def file_facts(
    model: InTIClipForVideoClassification,
    dynamic_frames: bool = False,
    processor: InTIClipVideoProcessor | None = None,
) -> dict:
    """What a user of the file has to know.

    `labels` in the order of the logits, `num_frames` in training, with dynamic frames `least_frames` and `frame_step`,
    and `processor`: size, normalisation and sampling under the names of InTIClipVideoProcessor.
    """
    config = model.config
    facts = {"labels": [config.id2label[i] for i in range(config.num_labels)], "num_frames": config.num_frames}
    if dynamic_frames:
        facts["least_frames"], facts["frame_step"] = frame_counts(model)
    if processor is not None:
        values = processor.to_dict()
        facts["processor"] = {name: values[name] for name in OPTIONS if name in values}
    return facts


class _Logits(nn.Module):
    def __init__(self, model: InTIClipForVideoClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


@contextmanager
def _without_noise():
    """Without what torch says to its own developers, and of weights that share memory, as an optimised model's do."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
            yield
    finally:
        log.setLevel(level)


def trace(model: InTIClipForVideoClassification, dynamic_frames: bool = False) -> ExportedProgram:
    """The model, which is put into evaluation mode, as a program of torch.export; see the errors of `frame_counts`."""
    config = model.config
    dims = {0: Dim("batch", min=1)}
    if dynamic_frames:
        least, step = frame_counts(model)
        n = Dim("n", min=least // step)
        dims[1] = n if step == 1 else step * n
    example = torch.zeros(2, config.num_frames, config.num_channels, config.image_size, config.image_size)
    with torch.enable_grad(), _without_noise():  # without gradients, an optimised model would work in pieces of a batch
        return torch.export.export(_Logits(model).eval(), (example,), dynamic_shapes=(dims,))


def export_program(
    model: InTIClipForVideoClassification,
    path: str | Path,
    dynamic_frames: bool = False,
    processor: InTIClipVideoProcessor | None = None,
) -> None:
    """Write a .pt2 file for `torch.export.load(path).module()`, with `file_facts` as its extra file hf_inti.json."""
    facts = file_facts(model, dynamic_frames, processor)
    program = trace(model, dynamic_frames)
    with _without_noise():
        torch.export.save(program, path, extra_files={FACTS_FILE: json.dumps(facts)})


def _stable_sort(x, stable=True, dim=-1, descending=False):
    """aten::sort.stable, which torch does not translate: TopK is stable, the lower index comes first."""
    from onnxscript import opset18 as op

    length = op.Reshape(op.Gather(op.Shape(x), dim, axis=0), op.Constant(value_ints=[1]))
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def export_onnx(
    model: InTIClipForVideoClassification,
    path: str | Path,
    dynamic_frames: bool = False,
    processor: InTIClipVideoProcessor | None = None,
) -> None:
    """Write an .onnx file; beside it PATH.data where the weights are too large for one file.

    Its metadata are `file_facts`, each value as JSON. Raises ImportError without onnx and onnxscript, and ValueError as
    `frame_counts`.
    """
    needs("onnx")
    needs("onnxscript")
    program = trace(model, dynamic_frames)
    names = {0: "batch", 1: "frames"} if dynamic_frames else {0: "batch"}
    with _without_noise():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": names},
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    facts = file_facts(model, dynamic_frames, processor)
    onnx_program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    onnx_program.save(path, external_data=size > ONE_FILE)


def file_size(path: str | Path) -> int:
    """Bytes, those of the weights beside an .onnx file included."""
    path = Path(path)
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def quantize_onnx(path: str | Path, out: str | Path) -> None:
    """Write an .onnx file of `export_onnx` again with int8 weights in its matrix products.

    Each output channel has a scale of its own; inputs are quantised to uint8 as they come. Convolutions stay as they
    are: they hold few weights, and are slower in int8. Weights use seven of the eight bits: with all of them, CPUs of
    x86 without VNNI saturate sums of two products, and the file's answers would be wrong there without a word. Raises
    ImportError without onnx and onnxruntime.
    """
    onnx, quantization = needs("onnx"), needs("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        prepared, large = Path(folder) / "prepared.onnx", file_size(path) > ONE_FILE
        quantization.quant_pre_process(  # constants are folded, so that weights are seen; torch has written the shapes
            path, prepared, skip_onnx_shape=True, skip_symbolic_shape=True, save_as_external_data=large
        )
        model = onnx.load(prepared)
    # The quantiser transposes weights, and would stumble over their old shapes.
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    quantization.quantize_dynamic(
        model,
        out,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
    )


def onnx_session(path: str | Path, threads: int | None = None):
    """An onnxruntime.InferenceSession on the CPU, with so many threads (default: one for each core).

    Its threads go on spinning for a moment after each run: what is timed in turns with it is slowed down.
    """
    onnxruntime = needs("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class ExportedModel:
    """An exported file, called as the model is: pixel_values (B, T, 3, height, width) on the CPU -> .logits (B, K)."""

    def __init__(self, path: str | Path, threads: int | None = None):
        if Path(path).suffix == ".pt2":
            self.run = torch.export.load(path).module()
        else:
            session = onnx_session(path, threads)
            self.run = lambda x: torch.from_numpy(session.run(["logits"], {"pixel_values": x.numpy()})[0])

    def eval(self):
        return self

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.run(pixel_values))


@torch.no_grad()
def largest_difference(
    model: InTIClipForVideoClassification, exported: ExportedModel, dynamic_frames: bool = False, draws: int = 1
) -> float:
    """Of the logits of both on random clips, in batches of several sizes and with dynamic frames of several lengths.

    A batch that differs by more than TOLERANCE is drawn again, `draws` times in all.
    """
    config = model.eval().config
    shapes = [(B, config.num_frames) for B in (1, 2, 3)]
    if dynamic_frames:
        least, step = frame_counts(model)
        shapes += [(2, least), (1, config.num_frames + step)]
    generator = torch.Generator().manual_seed(0)
    differences = []
    for B, T in shapes:
        for _ in range(draws):
            clips = torch.randn(B, T, config.num_channels, config.image_size, config.image_size, generator=generator)
            difference = (model(clips).logits - exported(clips).logits).abs().max().item()
            if difference <= TOLERANCE:
                break
        differences.append(difference)
    return torch.tensor(differences).max().item()  # NaN if one is


def check_exported(model: InTIClipForVideoClassification, path: str | Path, dynamic_frames: bool = False) -> float:
    """Load the file again and return its `largest_difference`; ValueError if that is above TOLERANCE."""
    # Where two tokens or frames are as good as equal, rounding decides which is chosen: in one clip of thirty or so.
    draws = 5 if model.config.compression in ("tome", "sta", "stts") else 1
    difference = largest_difference(model, ExportedModel(path), dynamic_frames, draws)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{path} does not compute what the model computes: logits differ by up to {difference:.2g}, more than "
            f"{TOLERANCE:g}; do not use it."
        )
    return difference
