"""A small Hugging Face Hub on loopback: the HTTP API that pushing and loading use, with real hash checks, and faults.

Large files are addressed by SHA-256 as in Git LFS; a commit is a dictionary from path to content. What it cannot show
is that the real Hub accepts the same requests: that is what the live test in `test_push.py` is for.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_DoubleSecretToken0123456789"
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt")
LFS_MINIMUM = 10_000_000  # bytes; the Hub takes larger files only through LFS
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """Commits, branches and pull requests of one repository."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # also refs/pr/N
    requests: list[str] = field(default_factory=list)  # titles; number N is at N - 1

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        content = repr([parent, len(self.commits), sorted((path, sha256(data)) for path, data in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    kind: "status" answers with a status; "drop" closes the connection after reading half of the body; "lost" does the
    work, then closes instead of answering; "cut" closes in the middle of the answer; "corrupt" flips a bit of the
    answer; "echo" answers 403 with the caller's credentials; "refuse card" rejects its metadata; "race" calls `action`
    first.
    """

    kind: str
    match: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    action: Callable[[], None] | None = None


class HubDouble:
    """The server. `with HubDouble() as hub:` gives `hub.url`; `hub.log` holds (method, path, body length)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.downloads: dict[str, bytes] = {}  # plain files below /files/
        self.honours_ranges = True
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.credentials: list[str] = []  # every Authorization header
        self.sent = 0  # bytes of answers
        self.lock = threading.RLock()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubDouble":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": GITATTRIBUTES})
        return repo

    def fail(self, match: str, kind: str = "status", **options) -> None:
        """Let the next requests fail whose "METHOD path" matches a pattern."""
        self.faults.append(Fault(kind, match, **options))

    def count(self, match: str) -> int:
        return sum(bool(re.search(match, f"{method} {path}")) for method, path, _ in self.log)

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.match, request)), None)
            if fault is not None:
                fault.times -= 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.fault = fault = self.hub.take_fault(f"{self.command} {unquote(url.path)}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self._read(length // 2 if fault and fault.kind == "drop" else length)
        self.hub.log.append((self.command, unquote(url.path), len(body)))
        self.hub.credentials.append(self.headers.get("Authorization", ""))
        if fault and fault.kind == "drop":
            return self._hang_up()
        if fault and fault.kind == "status":
            return self._send(fault.status, b"<html>trouble</html>", {"Content-Type": "text/html", **fault.headers})
        if fault and fault.kind == "echo":
            return self._json({"error": f"forbidden for {self.headers.get('Authorization')}"}, 403)
        if fault and fault.action:
            fault.action()
        with self.hub.lock:
            return self._route(url.path, body)

    def _read(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.kind == "lost":
            return self._hang_up()
        if self.fault and self.fault.kind == "corrupt" and body and self.command != "HEAD":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        cut = self.fault is not None and self.fault.kind == "cut"
        body = body[: len(body) // 2] if cut else body
        self.wfile.write(body)
        self.hub.sent += len(body)
        return self._hang_up() if cut else None

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, headers)

    # Routes

    def _route(self, path: str, body: bytes) -> None:
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match is not None:
                repo_id = match.groupdict().get("repo")
                if repo_id is not None and not self._may_see(repo_id):
                    return self._error(401, "Repository not found", "RepoNotFound")
                if self.command in ("POST", "PUT") and "/lfs-store/" not in path and not self._is_known():
                    return self._error(401, "Invalid username or password.")
                return method(self, body, **{key: unquote(value) for key, value in match.groupdict().items()})
        return self._error(404, f"no route for {self.command} {path}")

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_see(self, repo_id: str) -> bool:
        repo = self.hub.repos.get(repo_id)
        return repo is not None and (not repo.private or self._is_known())

    def _revision(self, repo: str, revision: str) -> str | None:
        known = self.hub.repos[repo]
        sha = known.branches.get(revision, revision)
        if sha in known.commits:
            return sha
        self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return None

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request['organization'] or 'user'}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        self.hub.create(repo_id, request.get("visibility") == "private")
        return self._json(answer)

    def validate(self, body: bytes) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            ok = match is not None and isinstance(yaml.safe_load(match[1]), dict)
        except yaml.YAMLError:
            ok = False
        ok = ok and not (self.fault and self.fault.kind == "refuse card")
        errors = [] if ok else [{"message": "the metadata is no YAML mapping, or licence unknown"}]
        self._json({"errors": errors, "warnings": []}, 200 if ok else 400)

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha = self._revision(repo, revision)
        if sha is not None:
            paths = self.hub.repos[repo].commits[sha]
            siblings = [{"rfilename": path} for path in paths]
            private = self.hub.repos[repo].private
            self._json({"id": repo, "sha": sha, "private": private, "tags": [], "downloads": 0, "siblings": siblings})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        branches = self.hub.repos[repo].branches
        if revision in branches:
            return self._error(409, "Reference already exists")
        branches[revision] = branches[json.loads(body or b"{}").get("startingPoint", "main")]
        return self._json({})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        sha = self._revision(repo, revision)
        if sha is None:
            return
        existing = self.hub.repos[repo].commits[sha]
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] >= LFS_MINIMUM
            data = existing.get(path)
            oid = None if data is None else sha256(data) if lfs else git_hash(data)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs-store/{entry['oid']}?X-Signature=signed{entry['size']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/api/lfs-verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid or self.query["X-Signature"] != [f"signed{len(body)}"]:
            return self._error(400, "the content does not have the announced SHA-256 and size")
        self.hub.lfs[oid] = body
        return self._send(200, b"", {})

    def lfs_verify(self, body: bytes) -> None:
        request = json.loads(body)
        stored = self.hub.lfs.get(request["oid"])
        if stored is None or len(stored) != request["size"]:
            return self._error(404, "object not found")
        return self._json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        entries = [json.loads(line) for line in body.splitlines()]
        header = next(entry["value"] for entry in entries if entry["key"] == "header")
        known, sha = self.hub.repos[repo], self._revision(repo, revision)
        if sha is None:
            return None
        if header.get("parentCommit") not in (None, sha):
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(known.commits[sha])
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs or len(self.hub.lfs[value["oid"]]) != value["size"]:
                    return self._error(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return self._error(404, "A file with this name doesn't exist", "EntryNotFound")
        request_url = None
        if self.query.get("create_pr") == ["1"]:
            known.requests.append(header["summary"])
            revision = f"refs/pr/{len(known.requests)}"
            request_url = f"{self.hub.url}/{repo}/discussions/{len(known.requests)}"
        oid = known.commit(revision, files)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        return self._json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": request_url})

    def discussions(self, body: bytes, repo: str) -> None:
        entries = [
            {
                "title": title,
                "num": number,
                "author": {"name": "user"},
                "createdAt": "2025-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
            }
            for number, title in enumerate(self.hub.repos[repo].requests, 1)
        ]
        self._json({"discussions": entries, "count": len(entries), "start": 0})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        sha = self._revision(repo, revision)
        if sha is None:
            return
        entries = []
        for path, data in self.hub.repos[repo].commits[sha].items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if path.endswith(LFS_SUFFIXES) or len(data) >= LFS_MINIMUM:
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n"
                entry["oid"] = git_hash(pointer.encode())
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
            entries.append(entry)
        self._json(entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha = self._revision(repo, revision)
        if sha is None:
            return None
        data = self.hub.repos[repo].commits[sha].get(path)
        if data is None:
            return self._error(404, "Entry not found", "EntryNotFound")
        etag = sha256(data) if path.endswith(LFS_SUFFIXES) else git_hash(data)
        return self._content(data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def plain(self, body: bytes, name: str) -> None:
        if name not in self.hub.downloads:
            return self._error(404, "not found")
        return self._content(self.hub.downloads[name], {})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None or not self.hub.honours_ranges:
            return self._send(200, data, headers)
        start = int(match[1])
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self._send(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}", **headers})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"POST /api/models/{_REPO}/branch/(?P<revision>[^/]+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}/discussions", _Handler.discussions),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs-store/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (r"POST /api/lfs-verify", _Handler.lfs_verify),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (r"GET /files/(?P<name>.+)", _Handler.plain),
]
