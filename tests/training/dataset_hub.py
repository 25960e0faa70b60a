"""Data sets on the local Hub: the routes that `datasets` and `HfFileSystem` use to find and read files."""

import json
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
from huggingface_hub import constants

from tests.hub.hub_double import HubDouble, _Handler, git_hash, sha256


class DatasetHub(HubDouble):
    """A `HubDouble` whose repositories are data sets."""

    def __init__(self) -> None:
        super().__init__()
        self.server.RequestHandlerClass = type("BoundHandler", (_DatasetHandler,), {"hub": self})

    def add(self, repo_id: str, folder: Path, private: bool = False) -> None:
        """Make a data set of the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repo = self.create(repo_id, private)
        repo.commit("main", {**repo.files(), **files})


class _DatasetHandler(_Handler):
    def _route(self, path: str, body: bytes) -> None:
        path = re.sub(r"^/api/datasets/", "/api/models/", re.sub(r"^/datasets/", "/", path))
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(tree|paths-info)/([^/]+)/?(.*)", path)
        if match is None or match[1] not in self.hub.repos:
            return super()._route(path, body)
        repo, kind, revision, folder = (unquote(part) for part in match.groups())
        if not self._may_see(repo):
            return self._error(401, "Repository not found", "RepoNotFound")
        sha = self._revision(repo, revision)
        if sha is None:
            return None
        files = self.hub.repos[repo].commits[sha]
        if kind == "paths-info":
            wanted = self._paths(body)
            entries = [entry for entry in _entries(files, "", True) if entry["path"] in wanted]
            return self._json(entries)
        if folder and not any(name.startswith(f"{folder}/") for name in files):
            return self._error(404, "Entry not found", "EntryNotFound")
        return self._json(_entries(files, folder, self.query.get("recursive", ["false"])[0].lower() in ("true", "1")))

    def _paths(self, body: bytes) -> list[str]:
        return json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return super()._content(data, headers)
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        return self._send(
            206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}", **headers}
        )


def _entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, object]] = {}
    for name, data in files.items():
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            lfs = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            found[name] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data), "lfs": lfs}
    return list(found.values())


def connect(url: str) -> None:
    """Let this process take the local Hub for the real one."""
    with pytest.MonkeyPatch.context() as patch:  # of which nothing is undone
        patch_hub(patch, url)
        patch._setattr.clear()


def patch_hub(patch: pytest.MonkeyPatch, url: str) -> None:
    """Let `huggingface_hub` and `datasets` take the local Hub for the real one."""
    import datasets.config

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(datasets.config, "HF_ENDPOINT", url)
    patch.setattr(datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
