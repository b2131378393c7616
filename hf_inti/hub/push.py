"""A trained model as a repository on the Hub: gather its files, try them as a stranger would, push them in one commit.

    push_model("outputs/k400/best", "me/inti-clip-vitb-k400", private=True)

Nothing here takes, keeps or prints a token: huggingface_hub finds it (`hf auth login`, or the variable HF_TOKEN).
"""

import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .card import FIGURE
from .folder import PICKLES, check_contents, files_of, prepare_folder, validate_folder, without_token


FAILURES = (HTTPError, OSError, ValueError, KeyError, RuntimeError)  # all that huggingface_hub raises for a bad answer
WAITS = (1, 2, 4)  # seconds before a request is made again
STEPS = {
    "/api/repos/create": "creating the repository",
    "/api/validate-yaml": "checking the card",
    "/preupload/": "announcing the files",
    "/info/lfs/": "preparing the upload",
    "/commit/": "committing",
    "/api/models/": "looking the repository up",
}
ADVICE = {
    400: "the Hub does not accept what was sent: correct it, and push again",
    402: "the namespace {namespace} has no more room: see its billing",
    422: "the Hub does not accept what was sent: correct it, and push again",
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that is still valid",
    403: "this token has no write permission for {namespace}: use one that has, or another namespace",
    404: "there is no {repo_id} that this token can see: check the name, and push again",
    409: "the name is taken or the repository is being changed: wait a minute and push again, or choose another name",
    412: "the repository was changed at the same time: push again",
    429: "too many requests: wait some minutes, and push again",
}
# What an earlier push may have left that would be false beside the new model: weights, results, logs, any pickle.
STALE = r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|\.eval_results/.*|run\.json|metrics\.jsonl|" + (
    rf"{re.escape(FIGURE)}|.*({'|'.join(map(re.escape, PICKLES))})"
)


def push_model(
    model_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    facts: str | None = None,
    results: str | os.PathLike | None = None,
    benchmark: str | os.PathLike | None = None,
    example: str | os.PathLike | None = None,
    commit_message: str = "Push model",
    dry_run: bool = False,
) -> str:
    """Prepare, validate and push a model; returns the repository's URL. Prints what it did.

    Args:
        model_dir, facts, results, benchmark, example: see `prepare_folder`.
        repo_id, private, commit_message: see `push_folder`.
        dry_run: stop before the push, and print the files with their sizes and the card; needs neither network nor
            token.

    Raises ValueError, of one line, for whatever is wrong with the model, the card or the push.
    """
    check_repo_id(repo_id)
    if not dry_run:
        check_token()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "repository"
        given = {"facts": facts, "results": results, "benchmark": benchmark, "example": example}
        for note in prepare_folder(model_dir, folder, repo_id, **given):
            print(note)
        validate_folder(folder, model_dir)
        print("Validated: loads without hf_inti, with equal logits.")
        if not dry_run:
            return push_folder(folder, repo_id, private=private, commit_message=commit_message)
        files = files_of(folder)
        for name, path in files.items():
            print(f"{path.stat().st_size:>12,}  {name}")
        print(f"{sum(path.stat().st_size for path in files.values()):>12,}  bytes in {len(files)} files")
        print((folder / "README.md").read_text())
    return f"{constants.ENDPOINT}/{repo_id}"


def push_folder(
    folder: str | os.PathLike, repo_id: str, *, private: bool = False, commit_message: str = "Push model"
) -> str:
    """Create the repository where there is none, and push the folder's files to it in one commit, or in none where
    they are all there already. Returns the repository's URL.

    What an earlier push left and is not in `folder` is deleted by the same commit where it would be false now: weights,
    which would be loaded in place of the new ones, results, logs, the figure, pickles. Other files are left alone.

    Args:
        repo_id: "namespace/name".
        private: create it private; refused where it exists and is public.

    Raises ValueError, of one line, that says what failed and what to do. What failed for a passing reason (429, 5xx,
    lost connections) was tried again before. A commit is made whole or not at all.
    """
    check_repo_id(repo_id)
    check_token()
    files = files_of(Path(folder))
    check_contents(files)
    api = HfApi()
    if not commit_message.strip():
        raise ValueError("commit_message is empty; say what is pushed.")
    before, is_new = _persist(lambda: _find_or_create(api, repo_id, private), repo_id)
    if private and not is_new and before.private is False:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or leave --private out.")
    deleted = []

    def commit():
        # All made anew each time: operations remember what was uploaded. Doing it again is safe: if the commit was made
        # and only its answer lost, all files are found unchanged, and no second commit is made.
        info = api.model_info(repo_id)
        there = [sibling.rfilename for sibling in info.siblings or []]
        deleted[:] = [name for name in there if name not in files and re.fullmatch(STALE, name)]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in deleted]
        # On top of what was looked at: with another push in between it is refused, and made anew from there.
        parent = info.sha if info.sha and re.fullmatch(constants.REGEX_COMMIT_OID, info.sha) else None
        return api.create_commit(repo_id, operations, commit_message=commit_message, parent_commit=parent)

    made = _persist(commit, repo_id)
    url = f"{api.endpoint}/{repo_id}"
    if made.oid == before.sha:
        print(f"No commit made: nothing has changed since the last push to {url}")
    else:
        print(f"Pushed {len(files)} files to {url} in one commit, {made.oid[:8]}.")
        if deleted:
            print(f"The same commit deleted {', '.join(deleted)}: of an earlier push.")
    return url


def _find_or_create(api: HfApi, repo_id: str, private: bool):
    """What is known of the repository, and whether it was made just now."""
    try:
        return api.model_info(repo_id), False
    except RepositoryNotFoundError:  # status 404, and 401 from servers that do not tell whether it exists
        api.create_repo(repo_id, private=private or None)  # None: public, or as the organisation wants it
        return api.model_info(repo_id), True


class Failure(NamedTuple):
    """A failed request: one line with what to do, might it succeed if made again, might it have made the commit."""

    text: str
    passing: bool = False
    in_doubt: bool = False


def _persist(action, repo_id: str):
    """What `action` returns; a passing failure is waited out, a lasting one is a ValueError."""
    in_doubt = False
    for wait in (*WAITS, None):
        try:
            return action()
        except FAILURES as error:
            failure = explain(error, repo_id)
        in_doubt = in_doubt or failure.in_doubt
        if wait is None or not failure.passing:
            break
        time.sleep(wait)
    done = "Nothing was committed."
    if in_doubt:
        done = "The commit may have been made nevertheless; pushing again commits only what is missing."
    # Out of the `except`, so that no traceback shows the request, with its headers, as the cause.
    raise ValueError(f"{failure.text} {done}")


def explain(error: BaseException, repo_id: str) -> Failure:
    """What huggingface_hub's error means for somebody who pushes."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return Failure("pushing needs the network: unset HF_HUB_OFFLINE.")
    answered = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    lost = next((e for e in chain if isinstance(e, (HTTPError, ConnectionError, TimeoutError))), None)
    path = _path_of(answered.response if answered is not None else lost)  # errors with an answer forget the request
    step = next((step for part, step in STEPS.items() if part in path), "uploading a file")
    again = path.startswith("/api/") and "/preupload/" not in path  # others were made again by huggingface_hub already
    if answered is not None:
        status = answered.response.status_code
        said = without_token(answered.server_message or "")[:300]
        advice = ADVICE.get(status, "the Hub has a problem: push again later" if status >= 500 else "push again later")
        advice = advice.format(repo_id=repo_id, namespace=repo_id.split("/")[0])
        text = f"{step} failed with status {status}{f' ({said})' if said else ''}: {advice}."
        lost_behind_a_gateway = status in (502, 504) and step == "committing"
        return Failure(text, again and (status in (408, 409, 412, 429) or status >= 500), lost_behind_a_gateway)
    if lost is not None:
        reason = without_token(str(lost)) or type(lost).__name__
        text = f"{step} failed, the connection was lost ({reason}): check the network, and push again."
        return Failure(text, again, in_doubt=step == "committing")
    if isinstance(error, (KeyError, json.JSONDecodeError)):
        return Failure("the Hub gave an answer that was not understood: push again later.", True)
    return Failure(f"the push failed: {without_token(' '.join(map(str, chain)))}")


def _path_of(asked) -> str:
    try:
        return asked.request.url.path
    except (AttributeError, RuntimeError):  # httpx's own where no request was set
        return ""


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError unless it is "namespace/name", both as the Hub takes them."""
    try:
        validate_repo_id(repo_id)
        good = repo_id.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise ValueError(f"the repository must be given as NAMESPACE/NAME, such as me/inti-clip, got {repo_id!r}.")


def check_token() -> None:
    """Raise a ValueError where no token is set."""
    if get_token() is None:
        raise ValueError("there is no token to push with: log in with `hf auth login`, or set HF_TOKEN.")
