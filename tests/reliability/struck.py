"""scripts/train.py in torchrun's processes, to which STRIKE happens after the third step; STRUCK_AT is then touched.

"death": the second process dies. "signal": a scheduler ends the job, and sends SIGTERM to every process of it.
"""

import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hf_inti.training.state import TrainingState  # noqa: E402


STEP = 3


def die() -> None:
    if os.environ["RANK"] == "1":
        Path(os.environ["STRUCK_AT"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def signal_job() -> None:
    """From another process: torchrun, its processes, and their data workers get it."""
    if os.environ["RANK"] != "0":
        return
    if (sender := os.fork()) == 0:
        try:
            Path(os.environ["STRUCK_AT"]).touch()
            torchrun = psutil.Process(os.getppid()).parent()
            for process in [torchrun, *torchrun.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    if process.pid != os.getpid():
                        process.send_signal(signal.SIGTERM)
        finally:
            os._exit(0)
    os.waitpid(sender, 0)


def main() -> None:
    strike = {"death": die, "signal": signal_job}[os.environ["STRIKE"]]
    finish = TrainingState.finish_step

    def replacement(self):
        finish(self)
        if self.step == STEP:
            strike()

    TrainingState.finish_step = replacement
    sys.argv[0] = str(ROOT / "scripts" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
