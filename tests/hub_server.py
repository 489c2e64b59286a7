"""
A Hub on loopback: the parts of the Hub's HTTP interface through which huggingface_hub creates, pushes and loads models.

    with HubServer() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(home, token="hf_writer")})

Repositories live in memory. `hub.requests` lists what was asked: (method, path, status, the Range header).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Repository:
    """`commits` are whole trees, path -> content, oldest first; `branches` point into them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # sha256 of the files that came by LFS

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(tree))).encode()).hexdigest()
        self.commits[digest] = tree
        self.branches[branch] = digest
        return digest

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class HubServer:
    """Serves from a thread while the context lasts."""

    def __init__(self) -> None:
        self.users = {"hf_writer": "tester", "hf_reader": "reader"}
        self.read_only = {"hf_reader"}
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int, str | None]] = []
        self.cut_once: set[str] = set()  # sha256 of files whose next download breaks off half-way
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # As on the Hub, large files come from another host, which must not see the token.
        self.storage = f"http://localhost:{self._server.server_port}/storage"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create_repository(self, name: str, files: dict[str, bytes]) -> Repository:
        repository = self.repositories[name] = Repository()
        repository.commit("main", files)
        return repository

    @staticmethod
    def digest(content: bytes) -> str:
        """The sha256 by which LFS knows a file."""
        return _sha256(content)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process that takes this for the Hub, with caches of its own under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "HF_TOKEN": token or "",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        path = unquote(urlsplit(self.path).path)
        self.answered = 0
        try:
            with self.hub.lock:
                for method, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        answer(self, **match.groupdict())
                        break
                else:
                    raise Refused(404, f"No such page: {self.command} {path}")
        except Refused as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            self.send(refusal.status, body, {"Content-Type": "application/json", **refusal.headers})
        self.hub.requests.append((self.command, path, self.answered, self.headers.get("Range")))

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.answered = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # Who asks, and for what

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def writer(self, namespace: str | None = None) -> str:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token in self.hub.read_only:
            raise Refused(403, "You must use a write token to upload to a repository.")
        if namespace not in (None, user):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        return user

    def repository(self, name: str, reading: bool = False) -> Repository:
        repository, user = self.hub.repositories.get(name), self.user()
        owner = name.partition("/")[0]
        if repository is None or (repository.private and user != owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if reading and repository.gated and user != owner:
            message = f"Access to model {name} is restricted and you are not in the authorized list."
            raise Refused(403 if user else 401, message, "GatedRepo")
        return repository

    def revision(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        digest = repository.branches.get(revision, revision)
        if digest not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return digest, repository.commits[digest]

    # Answers

    def whoami(self) -> None:
        self.send_json({"type": "user", "name": self.writer(), "orgs": []})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(block[1]) if block else {}
        known = {"base_model", "datasets", "library_name", "license", "metrics", "pipeline_tag", "tags", "language"}
        known.add("model-index")
        wrong = [key for key in data if key not in known]
        wrong += [key for key in ("datasets", "metrics", "tags") if not isinstance(data.get(key, []), list)]
        wrong += [] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.get("base_model", "a")) else ["base_model"]
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                needed = [result["task"].get("type"), *(result["dataset"].get(key) for key in ("name", "type"))]
                needed += [metric.get(key) for metric in result["metrics"] for key in ("type", "value")]
                wrong += ["model-index"] * (None in needed or not entry.get("name"))
        errors = [{"message": f"{key} is not allowed"} for key in wrong]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        request = json.loads(self.body)
        name = request["name"]
        if not re.fullmatch(r"[\w-][\w.-]{0,95}", name) or name.startswith("-"):
            raise Refused(400, f"Invalid repo name: {name!r}")
        user = self.writer(request.get("organization"))
        full_name = f"{user}/{name}"
        if name == "models":
            raise Refused(400, f"The name {name!r} is reserved")
        if full_name in self.hub.repositories:
            url = f"{self.hub.endpoint}/{full_name}"
            self.send_json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = bool(request.get("private") or request.get("visibility") == "private")
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.hub.create_repository(full_name, {".gitattributes": attributes}).private = private
        self.send_json({"url": f"{self.hub.endpoint}/{full_name}", "name": full_name, "id": full_name})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        digest, tree = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in tree]
        self.send_json(
            {"id": name, "sha": digest, "private": repository.private, "gated": repository.gated, "siblings": siblings}
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        """All files, or those directly in a folder."""
        repository = self.repository(name, reading=True)
        entries = []
        for path, content in self.revision(repository, revision)[1].items():
            if folder is not None and path.rpartition("/")[0] != folder:
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}
            if _sha256(content) in repository.large:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        if folder is not None and not entries:
            raise Refused(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        self.send_json(entries)

    def branch(self, name: str, branch: str) -> None:
        self.writer(name.partition("/")[0])
        repository = self.repository(name)
        if branch in repository.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.branches["main"]
        self.send_json({})

    def preupload(self, name: str, revision: str) -> None:
        self.writer(name.partition("/")[0])
        tree = self.revision(self.repository(name), revision)[1]
        files = []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            large = path.endswith(".safetensors") or entry["size"] > 10 * 2**20
            there = tree.get(path)
            oid = None if there is None else _sha256(there) if large else _git_id(there)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": files})

    def lfs_batch(self, name: str) -> None:
        self.writer(name.partition("/")[0])
        self.repository(name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            address = f"{self.hub.storage}/{entry['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{self.hub.endpoint}/verify/{name}"}}
            missing = {} if entry["oid"] in self.hub.uploads else {"actions": actions}
            objects.append({"oid": entry["oid"], "size": entry["size"], **missing})
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            raise Refused(400, f"The content is not that of {oid}")
        self.hub.uploads[oid] = self.body
        self.send(200, b"", {})

    def verify(self, name: str) -> None:
        self.writer(name.partition("/")[0])
        request = json.loads(self.body)
        if len(self.hub.uploads.get(request["oid"], b"")) != request["size"]:
            raise Refused(400, f"{request['oid']} is not of size {request['size']}")
        self.send_json({})

    def commit(self, name: str, revision: str) -> None:
        self.writer(name.partition("/")[0])
        repository = self.repository(name)
        tree = dict(self.revision(repository, revision)[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                tree[value["path"]] = self.hub.uploads[value["oid"]]
                repository.large.add(value["oid"])
            elif kind == "deletedFile":
                del tree[value["path"]]
        digest = repository.commit(revision, tree)
        address = f"{self.hub.endpoint}/{name}/commit/{digest}"
        self.send_json({"success": True, "commitOid": digest, "commitUrl": address})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name, reading=True)
        digest, tree = self.revision(repository, revision)
        headers = {"X-Repo-Commit": digest, "Accept-Ranges": "bytes"}
        if path not in tree:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        content = tree[path]
        if _sha256(content) in repository.large:
            oid = _sha256(content)
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"'}
            self.send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/{oid}"})
        else:
            self.send_content(content, {**headers, "ETag": f'"{_git_id(content)}"'})

    def fetch(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")
        self.send_content(self.hub.uploads[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        cut = self.command == "GET" and _sha256(content) in self.hub.cut_once
        if cut:
            self.hub.cut_once.remove(_sha256(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self.send(200, content, headers, cut)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.send(206, content[first : last + 1], {**headers, **span}, cut)


_NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("GET",), rf"/api/models/{_NAME}", _Handler.info),
    (("GET",), rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/storage/(?P<oid>\w+)", _Handler.store),
    (("GET", "HEAD"), r"/storage/(?P<oid>\w+)", _Handler.fetch),
    (("POST",), rf"/verify/{_NAME}", _Handler.verify),
    (("GET", "HEAD"), rf"/(datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
