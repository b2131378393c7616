"""The routes of the Hub that pushing and loading a model use, on 127.0.0.1, for tests.

    from hub_server import hub_fixture  # noqa: F401 (it is called hub)

    def test_push(hub):
        hub.fail("commit", 500, times=1)  # the next request to commit is answered 500
        ...  # push: HF_ENDPOINT and HF_TOKEN are set, for this process and, by hub.environment(...), for others
        assert hub.commits("me/model") == 1

It is as strict as the Hub where a client could go wrong: tokens, namespaces, private repositories, sha256 and size of
large files, and no token where files lie. A commit is applied whole or not at all.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
import warnings
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
import yaml


WRITE, READ, OTHER = "hf_writeTokenForTestsOnly", "hf_readTokenForTestsOnly", "hf_otherTokenForTestsOnly"
TOKENS = {WRITE: ("me", "write"), READ: ("me", "read"), OTHER: ("somebody", "write")}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"
ROUTES = {  # by name, as `HubServer.fail` knows them
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"),
    "batch": ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/blobs/(?P<oid>[0-9a-f]{64})"),
    "commit": ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)"),
    "info": ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?"),
    "tree": ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    "resolve": ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    "whoami": ("GET", r"/api/whoami-v2"),
}
LARGE = (".safetensors", ".mp4", ".png", ".bin")


def blob_id(content: bytes) -> str:
    """The sha1 by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    """An answer that is an error: status, what it says, and the Hub's own word for it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    history: list[Commit] = field(default_factory=list)  # the first is the Hub's own, with .gitattributes alone

    def at(self, revision: str) -> Commit:
        for commit in self.history:
            if commit.sha == revision:
                return commit
        if revision != "main":
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return self.history[-1]

    def add(self, message: str, files: dict[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{len(self.history)} {message} {time.time_ns()}".encode()).hexdigest()
        self.history.append(Commit(sha, message, files))
        return self.history[-1]


class HubServer(ThreadingHTTPServer):
    """The server and what it holds; answers from the moment it is made until `close()`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # large files, by sha256
        self.requests: list[tuple[str, str, int]] = []  # method, path with query, status; 0: connection dropped
        self.faults: list[list] = []  # [route, status or "drop" or "lose", times left, method, message]
        self.truncated: dict[str, tuple[int, bool]] = {}  # path in a repository: bytes that are served, honestly?
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home, token: str | None = WRITE, **more: str) -> dict[str, str]:
        """The variables of a process that takes this for the Hub; `home`: its empty HF_HOME."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **hub, **({"HF_TOKEN": token} if token else {}), **more}

    def fail(self, route: str, what, times: int = 10**6, method: str | None = None, message: str = "told to") -> None:
        """Answer the next requests to a route with a status; "drop": not at all; "lose": do it, but do not answer."""
        assert route in ROUTES, route
        self.faults.append([route, what, times, method, message])

    def truncate(self, path: str, size: int, honest: bool = True) -> None:
        """Serve only the first bytes of a file; honest: its size says so too, as if it had been pushed like that."""
        self.truncated[path] = (size, honest)

    def commits(self, repo: str) -> int:
        """How many were pushed."""
        return len(self.repositories[repo].history) - 1 if repo in self.repositories else 0

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].at(revision).files

    def count(self, route: str) -> int:
        """How many requests a route got."""
        method, pattern = ROUTES[route]
        return sum(
            bool(re.fullmatch(method, m) and re.fullmatch(pattern, unquote(urlsplit(path).path)))
            for m, path, _ in self.requests
        )


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *arguments):
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        self.status = 0
        try:
            for name, (method, pattern) in ROUTES.items():
                if re.fullmatch(method, self.command) and (found := re.fullmatch(pattern, path)):
                    self.route(name, found.groupdict())
                    break
            else:
                raise Refused(404, f"no route {self.command} {path}")
        except Refused as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            if error.status == 429:
                headers["Retry-After"] = "0"
            self.answer({"error": error.message}, status=error.status, headers=headers)
        except BrokenPipeError:
            pass
        finally:
            self.server.requests.append((self.command, self.path, self.status))

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, name: str, where: dict[str, str]) -> None:
        with self.server.lock:
            fault = next((f for f in self.server.faults if f[0] == name and f[3] in (None, self.command)), None)
            if fault is not None:
                fault[2] -= 1
                if fault[2] == 0:
                    self.server.faults.remove(fault)
                if fault[1] == "drop":
                    return
                if fault[1] == "lose":
                    self.answer = lambda *arguments, **options: None
                elif isinstance(fault[1], int):
                    raise Refused(fault[1], fault[4])
            getattr(self, name)(**where)

    def answer(self, content, status: int = 200, headers: dict | None = None, length: int | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content, default=str).encode()  # YAML knows dates
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> tuple[str | None, str | None]:
        """Name and role of whose token came along; none is allowed, a wrong one is not."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        if header.removeprefix("Bearer ") not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[header.removeprefix("Bearer ")]

    def writer(self, namespace: str) -> None:
        name, role = self.user()
        if name is None:
            raise Refused(401, "Invalid username or password.")
        if role != "write" or namespace != name:
            raise Refused(403, f"You don't have the rights to write in the namespace {namespace!r}")

    def repository(self, repo: str) -> Repository:
        """One that the user may see; the Hub says 401 to strangers where there is none, too."""
        name, _ = self.user()
        found = self.server.repositories.get(repo)
        if found is None or (found.private and name != repo.split("/")[0]):
            raise Refused(404 if name else 401, "Repository not found", "RepoNotFound")
        return found

    def whoami(self) -> None:
        name, role = self.user()
        if name is None:
            raise Refused(401, "Invalid username or password.")
        self.answer({"type": "user", "name": name, "auth": {"accessToken": {"role": role}}, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.user()[0] or "nobody"
        self.writer(namespace)
        repo = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}
        if repo in self.server.repositories:
            return self.answer({**answer, "error": "You already created this model repo"}, status=409)
        repository = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repository.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.server.repositories[repo] = repository
        self.answer(answer)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        parts = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        errors = [] if parts else [{"message": "there is no metadata"}]
        try:
            if parts and not isinstance(yaml.safe_load(parts[1]), dict):
                errors = [{"message": "the metadata is no mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": f"bad YAML: {error}"}]
        self.answer({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        self.writer(repo.split("/")[0])
        now = self.repository(repo).at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            large = asked["path"].endswith(LARGE) or asked["size"] > 10 * 2**20
            answer = {
                "path": asked["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if asked["path"] in now:
                content = now[asked["path"]]
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else blob_id(content)
            answers.append(answer)
        self.answer({"files": answers})

    def batch(self, repo: str) -> None:
        self.writer(repo.split("/")[0])
        self.repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            place = {"href": f"{self.server.url}/blobs/{asked['oid']}", "header": {}}
            have = asked["oid"] in self.server.blobs
            objects.append({**asked, **({} if have else {"actions": {"upload": place}})})
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "the token is none of the file store's business")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "this is not the file whose sha256 was announced")
        self.server.blobs[oid] = self.body
        self.answer(b"")

    def commit(self, repo: str, revision: str) -> None:
        self.writer(repo.split("/")[0])
        repository = self.repository(repo)
        head = repository.at(revision)
        header, *operations = (json.loads(line) for line in self.body.decode().splitlines())
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise Refused(412, "A commit has happened since.")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.server.blobs.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refused(400, f"{value['path']} was not uploaded whole")
                files[value["path"]] = content
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"unknown operation {key}")
        made = repository.add(header["value"]["summary"], files)
        address = f"{self.server.url}/{repo}/commit/{made.sha}"
        self.answer({"success": True, "commitOid": made.sha, "commitUrl": address})

    def info(self, repo: str, revision: str | None) -> None:
        repository = self.repository(repo)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": repo, "modelId": repo, "sha": commit.sha, "private": repository.private, "siblings": siblings}
        card = re.match(r"---\n(.*?)\n---", commit.files.get("README.md", b"").decode(), re.DOTALL)
        metadata = yaml.safe_load(card[1]) if card else {}
        more = {"pipeline_tag": metadata.get("pipeline_tag"), "library_name": metadata.get("library_name"), "tags": []}
        self.answer({**about, **more, "cardData": metadata, "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, path: str | None) -> None:
        files = self.repository(repo).at(revision).files
        inside = {name: content for name, content in files.items() if path is None or name.startswith(f"{path}/")}
        if path is not None and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        entries = []
        for name, content in sorted(inside.items()):
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
            if name.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.repository(repo).at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers}
            return self.answer({"error": "Entry not found"}, status=404, headers=message)
        content = commit.files[path]
        if path.endswith(LARGE):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["ETag"] = f'"{blob_id(content)}"'
        size, honest = self.server.truncated.get(path, (len(content), True))
        if path.endswith(LARGE):
            headers["X-Linked-Size"] = str(size if honest else len(content))
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        content = content[:size][int(first[1]) :]
        self.answer(content, status=206 if "Range" in self.headers else 200, headers=headers)


@pytest.fixture(name="hub")
def hub_fixture(tmp_path, monkeypatch):
    """A HubServer that this process takes for the Hub, with a token that may write to `me`, and an empty cache."""
    # What huggingface_hub's upload of large files makes httpx say.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    server = HubServer()
    for name in [name for name in os.environ if name.startswith(("HF_HUB", "HF_OIDC", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment(tmp_path / "hf_home").items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
    constants = huggingface_hub.constants  # these were read from the environment at the first import: too early
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf_home" / "token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    yield server
    server.close()
