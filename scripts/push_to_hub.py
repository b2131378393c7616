"""Push a trained model to the Hub, with code, card, example, handler and training log, in one commit.

    python scripts/push_to_hub.py outputs/k400/best me/inti-clip-vitb-k400 --metadata inti-clip-vitb-k400 --private

Before anything is sent, a new process without this package loads the files and must get the same logits. Pushing the
same model again makes no commit. Log in first with `hf auth login`, or set HF_TOKEN.
"""

from dataclasses import asdict, dataclass, field

from huggingface_hub.utils import enable_progress_bars
from transformers.utils.logging import disable_progress_bar

from hf_inti.hub.push import push_model
from hf_inti.training.cli import parse_arguments, run_script


@dataclass
class PushArguments:
    model_dir: str = field(metadata={"help": "Folder of the trained model, such as best/ or last/ of train.py."})
    repo_id: str = field(metadata={"help": "Repository, NAMESPACE/NAME; created if it does not exist."})
    private: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    metadata: str | None = field(
        default=None,
        metadata={"help": "Metadata for the card: a YAML file or a name in model_cards/; default: from the run."},
    )
    results: str | None = field(
        default=None, metadata={"help": "results.json of evaluate.py; without it the card claims no accuracy."}
    )
    benchmark: str | None = field(
        default=None, metadata={"help": "File of hf_inti.comparison.measure; without it the card claims no speed."}
    )
    example: str | None = field(
        default=None, metadata={"help": "An .mp4 to show on the card; default: a generated clip."}
    )
    commit_message: str = field(default="Push model", metadata={"help": "Commit message."})
    dry_run: bool = field(
        default=False, metadata={"help": "Only print the files and the card; needs no network or token."}
    )


def main() -> None:
    disable_progress_bar()  # of loading and saving weights ...
    enable_progress_bars()  # ... but not of the upload
    push_model(**asdict(parse_arguments(PushArguments, ["model_dir", "repo_id"], description=__doc__)))


if __name__ == "__main__":
    run_script(main)
