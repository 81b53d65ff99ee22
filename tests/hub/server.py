"""A Hub on localhost: the calls that pushing and loading make, answered as the real one answers them.

It keeps repos in memory as branches of commits, each a whole set of files. What is uploaded by LFS is not visible
before a commit names it, and a commit is all or nothing; that is what makes an aborted upload harmless, and what the
tests rely on, so it is the server's one rule. `fail` makes the next calls of a kind break in the middle.

Point a *fresh process* to it (`environment`): the client reads its settings when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .card_rules import problems

TOKENS = {"hf_me": "me", "hf_other": "other"}
"""Who logs in with which token."""

MEMBERS = {"lab": {"me"}, "rivals": {"other"}}
"""Who belongs to which organisation, and may write to all that it owns."""

ROOT = Path(__file__).parents[2]

Files = dict[str, bytes]


@dataclass
class Repo:
    """One model repo: commits by id, branches by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)

    def commit(self, branch: str, files: Files) -> str:
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(repr((content, self.branches.get(branch), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


class Hub:
    """The state of the server, and where it listens.

    Attributes:
        repos: by id.
        calls: `METHOD /path` of every request.
        fail: kinds of calls that break: `"create"`, `"preupload"`, `"lfs-put"`, `"commit"`, or `"everything"`, which
            gets no answer.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.fail: set[str] = set()
        self.endpoint = ""

    def add(self, name: str, files: Files | None = None, **settings: Any) -> Repo:
        repo = self.repos[name] = Repo(**settings)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def add_folder(self, name: str, folder: Path, **settings: Any) -> Repo:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.add(name, files, **settings)

    def environment(self, home: Path, token: str | None = "hf_me", **more: str) -> dict[str, str]:
        """Of a process that has no other Hub, an empty cache in `home`, and is logged in with `token`."""
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DEBUG": "0",
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return settings | ({"HF_TOKEN": token} if token else {}) | more


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on a free port of this machine while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RefusedError(Exception):
    """An answer that is an error: status, the header `X-Error-Code`, message."""

    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class Answers(BaseHTTPRequestHandler):
    """One request. Routes are methods whose docstring is `METHOD pattern`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.calls.append(f"{self.command} {path}")
        if "everything" in self.hub.fail:
            self.close_connection = True  # no answer at all
            return
        try:
            for pattern, route in ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return route(self, **found.groupdict())
            raise RefusedError(404, message=f"no route for {self.command} {path}")
        except RefusedError as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Error-Message": refusal.message} if refusal.message else {}
            self.answer(refusal.body or {"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        found = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in found.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass

    # ------------------------------------------------------------------------------------------- who may do what

    @property
    def user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(given)

    def owns(self, name: str) -> bool:
        """Whether the user is the repo's owner or belongs to the organisation that is."""
        owner = name.partition("/")[0]
        return self.user is not None and (self.user == owner or self.user in MEMBERS.get(owner, ()))

    def readable(self, name: str, *, files: bool = False) -> Repo:
        """The repo, if the user may see it; with `files` if he may have its files, too."""
        repo, user = self.hub.repos.get(name), self.user
        if repo is None or (repo.private and not self.owns(name)):
            # The real one does not tell strangers whether a repo exists.
            raise RefusedError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if files and repo.gated and not self.owns(name) and user not in repo.readers:
            raise RefusedError(401 if user is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def writable(self, name: str) -> Repo:
        repo = self.readable(name)
        if not self.owns(name):
            raise RefusedError(403, message="you don't have the rights to write to this repo")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        sha = repo.find(revision)
        if sha is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def break_if(self, kind: str) -> None:
        if kind in self.hub.fail:
            raise RefusedError(400, message=f"broken on purpose: {kind}")  # the client tries again after 500

    # --------------------------------------------------------------------------------------------------- the calls

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self.user
        if user is None:
            raise RefusedError(401, message="Invalid username or password.")
        self.break_if("create")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not self.owns(name):
            raise RefusedError(
                403, message=f'You don\'t have the rights to create a model under the namespace "{name}"'
            )
        reply = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            raise RefusedError(409, message="You already created this model repo", body=reply | {"error": "exists"})
        self.hub.add(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self.answer(reply)

    def whoami(self) -> None:
        if self.user is None:
            raise RefusedError(401, message="Invalid username or password.")
        self.answer(
            {
                "name": self.user,
                "type": "user",
                "orgs": [{"name": name} for name, members in MEMBERS.items() if self.user in members],
            }
        )

    def validate(self) -> None:
        found = problems(json.loads(self.body)["content"])
        errors = [{"message": message} for message in found]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, name: str, branch: str) -> None:
        repo = self.writable(name)
        if branch in repo.branches:
            raise RefusedError(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self.answer({})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.writable(name)
        self.break_if("preupload")
        files = repo.commits[self.revision(repo, revision)]
        self.answer(
            {
                "files": [
                    {
                        "path": entry["path"],
                        "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": blob_id(entry["path"], files.get(entry["path"])),
                    }
                    for entry in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, name: str) -> None:
        self.writable(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            reply = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.hub.lfs:
                href = f"{self.hub.endpoint}/lfs-store/{asked['oid']}"
                verify = f"{self.hub.endpoint}/{name}.git/info/lfs/verify"
                reply["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(reply)
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        self.break_if("lfs-put")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, message="the content is not what the oid says")
        self.hub.lfs[oid] = self.body
        self.answer({})

    def verify(self, name: str) -> None:
        self.writable(name)
        asked = json.loads(self.body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, message="the object is not there")
        self.answer({"success": True})

    def commit(self, name: str, revision: str) -> None:
        wants_pr = self.query.get("create_pr") == ["1"]
        repo = self.readable(name) if wants_pr else self.writable(name)
        self.break_if("commit")
        files = dict(repo.commits[self.revision(repo, revision)])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise RefusedError(
                        400, message=f"LFS pointer of {value['path']} points to a file that does not exist"
                    )
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
        branch = f"refs/pr/{len(repo.branches)}" if wants_pr else revision
        sha = repo.commit(branch, files)
        reply = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"}
        if wants_pr:
            number = branch.rpartition("/")[2]
            reply["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        self.answer(reply)

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.readable(name)
        sha = self.revision(repo, revision)
        names = sorted(repo.commits[sha])
        self.answer(
            {
                "id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [],
                "gated": "auto" if repo.gated else False, "siblings": [{"rfilename": name} for name in names],
            }
        )  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        repo = self.readable(name, files=True)
        files = repo.commits[self.revision(repo, revision)]
        self.answer([{"type": "file", "path": p, "size": len(d), "oid": blob_id(p, d)} for p, d in files.items()])

    def file(self, name: str, revision: str, path: str) -> None:
        repo = self.readable(name, files=True)
        sha = self.revision(repo, revision)
        if path not in repo.commits[sha]:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        data = repo.commits[sha][path]
        self.answer(data, headers={"X-Repo-Commit": sha, "ETag": f'"{blob_id(path, data)}"'})


def blob_id(path: str, data: bytes | None) -> str | None:
    """What identifies a file's content: sha256 under LFS, git's own sha1 of the blob else."""
    if data is None:
        return None
    if path.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    ("POST /api/repos/create", Answers.create),
    ("GET /api/whoami-v2", Answers.whoami),
    ("POST /api/validate-yaml", Answers.validate),
    (f"POST /api/models/{NAME}/branch/(?P<branch>[^/]+)", Answers.branch),
    (f"POST /api/models/{NAME}/preupload/{REVISION}", Answers.preupload),
    (f"POST /{NAME}[.]git/info/lfs/objects/batch", Answers.batch),
    (f"POST /{NAME}[.]git/info/lfs/verify", Answers.verify),
    ("PUT /lfs-store/(?P<oid>[0-9a-f]+)", Answers.put),
    (f"POST /api/models/{NAME}/commit/{REVISION}", Answers.commit),
    (f"GET /api/models/{NAME}/revision/{REVISION}", Answers.info),
    (f"GET /api/models/{NAME}/tree/{REVISION}", Answers.tree),
    (f"GET /api/models/{NAME}", Answers.info),
    (f"(GET|HEAD) /{NAME}/resolve/{REVISION}/(?P<path>.+)", Answers.file),
]


if __name__ == "__main__":  # to look at by hand
    with running_hub() as hub:
        print(hub.endpoint)
        sys.stdin.read()
