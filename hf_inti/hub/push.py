"""Pushes a trained model to the Hub: gathers its files, checks that they work without hf_inti, makes one commit.

    push_model("outputs/k400/best", "me/inti-clip-vitb-k400", private=True)

No function takes, stores or prints a token: huggingface_hub finds it (`hf auth login`, or the variable HF_TOKEN).
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
)
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


T = TypeVar("T")

# What huggingface_hub may raise for a failed request.
FAILURES = (HTTPError, OSError, ValueError, KeyError, RuntimeError)
WAITS = (1, 2, 4)  # seconds before each retry
STEPS = {  # part of a URL's path: what its request does
    "/api/repos/create": "creating the repository",
    "/api/validate-yaml": "checking the card",
    "/preupload/": "announcing the files",
    "/info/lfs/": "preparing the upload",
    "/commit/": "committing",
    "/api/models/": "looking the repository up",
}
ADVICE = {  # by HTTP status
    400: "the Hub does not accept what was sent: correct it, and push again",
    402: "the namespace {namespace} has no storage left: see its billing",
    422: "the Hub does not accept what was sent: correct it, and push again",
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that is still valid",
    403: "this token has no write permission for {namespace}: use one that has, or another namespace",
    404: "there is no {repo_id} that this token can see: check the name, and push again",
    409: "the name is taken or the repository is being changed: wait a minute and push again, or choose another name",
    412: "the repository was changed at the same time: push again",
    429: "too many requests: wait some minutes, and push again",
}
# Files of an earlier push that would be wrong for the new model: weights, results, logs, the figure, pickles.
STALE = r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|\.eval_results/.*|run\.json|metrics\.jsonl|" + (
    rf"{re.escape(FIGURE)}|.*({'|'.join(map(re.escape, PICKLES))})"
)


def push_model(
    model_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    metadata: str | None = None,
    results: str | os.PathLike | None = None,
    benchmark: str | os.PathLike | None = None,
    example: str | os.PathLike | None = None,
    commit_message: str = "Push model",
    dry_run: bool = False,
) -> str:
    """Prepare, validate and push a model. Prints a summary and returns the repository's URL.

    Args:
        model_dir, metadata, results, benchmark, example: see `prepare_folder`.
        repo_id, private, commit_message: see `push_folder`.
        dry_run: instead of pushing, print the card and the files with their sizes; needs neither network nor token.

    Raises a one-line ValueError for anything wrong with the model, the card or the push.
    """
    check_repo_id(repo_id)
    if not dry_run:
        check_token()
    with tempfile.TemporaryDirectory() as tmp_dir:
        folder = Path(tmp_dir) / "repository"
        options = {"metadata": metadata, "results": results, "benchmark": benchmark, "example": example}
        for note in prepare_folder(model_dir, folder, repo_id, **options):
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
    """Push a folder to the Hub in one commit, creating the repository if needed. Returns the repository's URL.

    No commit is made if the repository already has the same files. The commit also deletes files of earlier pushes that
    would be wrong for the new model and are not in `folder`: weights (which might be loaded instead of the new ones),
    results, logs, the figure and pickles. Other files are kept.

    Args:
        repo_id: "namespace/name".
        private: create a private repository; an error if it exists and is public.

    Raises a one-line ValueError that says what failed and what to do. Requests that fail temporarily (429, 5xx, lost
    connections) are retried first. The commit is atomic.
    """
    check_repo_id(repo_id)
    check_token()
    files = files_of(Path(folder))
    check_contents(files)
    api = HfApi()
    if not commit_message.strip():
        raise ValueError("commit_message must hold text, got none; say what is pushed.")
    before, is_new = _retry(lambda: _find_or_create(api, repo_id, private), repo_id)
    if private and not is_new and before.private is False:
        raise ValueError(
            f"{repo_id} must be private or new if private is set, got a public repository; make it private in its "
            "settings, or leave --private out."
        )
    deleted = []

    def commit() -> CommitInfo:
        # Operations remember what was uploaded, so each attempt needs new ones. Retrying is safe: if the commit was
        # made and only the response was lost, all files are unchanged and no second commit is made.
        info = api.model_info(repo_id)
        existing = [sibling.rfilename for sibling in info.siblings or []]
        deleted[:] = [name for name in existing if name not in files and re.fullmatch(STALE, name)]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in deleted]
        # Pin the parent commit: if someone pushes meanwhile, ours is rejected and retried from the new head.
        parent = info.sha if info.sha and re.fullmatch(constants.REGEX_COMMIT_OID, info.sha) else None
        return api.create_commit(repo_id, operations, commit_message=commit_message, parent_commit=parent)

    pushed = _retry(commit, repo_id)
    url = f"{api.endpoint}/{repo_id}"
    if pushed.oid == before.sha:
        print(f"No commit made: nothing has changed since the last push to {url}")
    else:
        print(f"Pushed {len(files)} files to {url} in one commit, {pushed.oid[:8]}.")
        if deleted:
            print(f"The same commit deleted {', '.join(deleted)}, left from an earlier push.")
    return url


def _find_or_create(api: HfApi, repo_id: str, private: bool) -> tuple[ModelInfo, bool]:
    """The Hub's information on the repository, and whether it was created just now."""
    try:
        return api.model_info(repo_id), False
    except RepositoryNotFoundError:  # status 404, or 401 if the server hides whether it exists
        api.create_repo(repo_id, private=private or None)  # None: the organisation's default, else public
        return api.model_info(repo_id), True


class Failure(NamedTuple):
    """A failed request, for the user."""

    text: str  # one line: what failed and what to do
    temporary: bool = False  # a retry may succeed
    may_have_committed: bool = False


def _retry(action: Callable[[], T], repo_id: str) -> T:
    """Call `action`, again after temporary failures, and return its result. Raises ValueError if it keeps failing."""
    may_have_committed = False
    for wait in (*WAITS, None):
        try:
            return action()
        except FAILURES as error:
            failure = explain(error, repo_id)
        may_have_committed = may_have_committed or failure.may_have_committed
        if wait is None or not failure.temporary:
            break
        time.sleep(wait)
    outcome = "Nothing was committed."
    if may_have_committed:
        outcome = "The commit may have been made all the same; pushing again commits only what is missing."
    # Raised outside the `except`, so that no traceback shows the request, with its headers, as the cause.
    raise ValueError(f"{failure.text} {outcome}")


def explain(error: BaseException, repo_id: str) -> Failure:
    """Translate an error of huggingface_hub into what failed, what to do, and whether to retry."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return Failure("pushing needs the network: unset HF_HUB_OFFLINE.")
    status_error = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    connection_error = next((e for e in chain if isinstance(e, (HTTPError, ConnectionError, TimeoutError))), None)
    # An HfHubHTTPError does not keep its request, but its response does.
    path = _path_of(status_error.response if status_error is not None else connection_error)
    step = next((step for part, step in STEPS.items() if part in path), "uploading a file")
    retry = path.startswith("/api/") and "/preupload/" not in path  # huggingface_hub has retried the others itself
    if status_error is not None:
        status = status_error.response.status_code
        detail = without_token(status_error.server_message or "")[:300]
        advice = ADVICE.get(status, "the Hub has a problem: push again later" if status >= 500 else "push again later")
        advice = advice.format(repo_id=repo_id, namespace=repo_id.split("/")[0])
        text = f"{step} failed with status {status}{f' ({detail})' if detail else ''}: {advice}."
        retry = retry and (status in (408, 409, 412, 429) or status >= 500)
        # A gateway may give up on a commit that the server behind it completes.
        return Failure(text, retry, may_have_committed=status in (502, 504) and step == "committing")
    if connection_error is not None:
        reason = without_token(str(connection_error)) or type(connection_error).__name__
        text = f"{step} failed, the connection was lost ({reason}): check the network, and push again."
        return Failure(text, retry, may_have_committed=step == "committing")
    if isinstance(error, (KeyError, json.JSONDecodeError)):
        return Failure("the Hub sent an invalid response: push again later.", temporary=True)
    return Failure(f"the push failed: {without_token(' '.join(map(str, chain)))}")


def _path_of(source: Any) -> str:
    """The path of the URL that an HTTP response or error belongs to; "" if it has no request."""
    try:
        return source.request.url.path
    except (AttributeError, RuntimeError):  # httpx raises RuntimeError if no request was set
        return ""


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is "namespace/name" and valid on the Hub."""
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"the repository must be NAMESPACE/NAME, got {repo_id!r}; give one such as me/inti-clip.")


def check_token() -> None:
    """Raise ValueError if no token is set."""
    if get_token() is None:
        raise ValueError("a token must be set for pushing, got none; log in with `hf auth login`, or set HF_TOKEN.")
