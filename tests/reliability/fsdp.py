"""Train with FSDP2 in 2 processes on the CPU, and compare with one process.

    python tests/reliability/fsdp.py --output results/reliability/fsdp.json

The losses must be those of one process, also of a run that is stopped and resumed, and one process must load the model
that is saved.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from processes import (
    GLOBAL_BATCH,
    RARELY,
    check_resumed,
    difference,
    long_run,
    losses,
    saved_step,
    stop_after,
    train,
    within_an_epoch,
)
from tiny import check, main, run_processes

from hf_inti import InTIClipForVideoClassification


FSDP = {  # what `accelerate launch --config_file scripts/accelerate/fsdp2.yaml` sets
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "InTIClipEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def shard_on_cpu() -> None:
    """Accelerate shards only on accelerators: have it take gloo on CPUs for one."""
    PartialState._prepare_backend = lambda self, *arguments, **options: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    prepare = Accelerator.prepare

    def replacement(self, *objects, **options):
        prepared = prepare(self, *objects, **options)
        check(self.is_fsdp2, "the run must use FSDP2")
        placements = [type(parameter.data).__name__ for parameter in prepared[0].parameters()]
        check(set(placements) == {"DTensor"}, f"all parameters must be split, got {set(placements)}")
        return prepared

    Accelerator.prepare = replacement


def stopped_and_resumed(flags: list, work: Path, steps: int) -> list[float]:
    """The losses of a run that leaves, and comes back from its sharded checkpoint, in the middle of an epoch."""

    def stop() -> None:
        shard_on_cpu()
        stop_after(within_an_epoch(2 * steps // 5))

    output, flags = work / "resumed", [*flags, *RARELY]
    batch = ["--batch_size", GLOBAL_BATCH // 2, "--output_dir", output]
    statuses = run_processes(2, [*flags, *batch], work / "log", stop, **FSDP)
    check(statuses == [143, 143], f"both must end as by a signal, got {statuses}")
    saved = saved_step(output)
    train(2, [*flags, "--resume"], output, work / "log", shard_on_cpu, **FSDP)
    check_resumed(output, saved)
    return losses(output)


def logits(folder: Path) -> list[float]:
    """What a saved model says of noise. Weights would differ: AdamW moves keys' biases, which cancel, by rounding."""
    model = InTIClipForVideoClassification.from_pretrained(folder).eval()
    size = model.config.image_size
    clips = torch.randn(4, 4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(pixel_values=clips).logits.flatten().tolist()


def measure(work: Path, steps: int) -> dict:
    flags = long_run(work, steps)
    train(1, flags, work / "one", work / "log")
    train(2, flags, work / "split", work / "log", shard_on_cpu, **FSDP)
    one, split = losses(work / "one"), losses(work / "split")
    result = {"steps": steps, "loss_first": one[0], "loss_last": one[-1], "loss_difference": difference(one, split)}
    check(result["loss_difference"] <= 1e-5, f"the losses must be those of one process, got {result}")
    result["loss_difference_resumed"] = difference(split, stopped_and_resumed(flags, work, steps))
    check(result["loss_difference_resumed"] <= 1e-6, f"a resumed run's losses must be the same, got {result}")
    result["logit_difference"] = difference(logits(work / "one" / "last"), logits(work / "split" / "last"))
    check(result["logit_difference"] <= 1e-4, f"the saved models must say the same, got {result}")
    return result


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure, steps=20)
