"""A Hugging Face hub on this machine: what huggingface_hub asks of one, over plain HTTP.

It keeps blobs by their SHA-256 (and checks it), commits as maps of path → blob, and private
repositories from those without the token. `cut` breaks off an upload or a download in the middle.
"""

import base64
import hashlib
import itertools
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 8
PART = 32 * 1024
"""Blobs above this are uploaded in parts of it."""
LARGE = (".safetensors", ".png")


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)  # sha → path → (sha256, whether in LFS)
    branches: dict = field(default_factory=dict)

    def commit(self, branch: str, files: dict) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Hub(ThreadingHTTPServer):
    """Starts on a free port; `url` is its address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.sent: list[tuple[str, int]] = []  # blob, bytes that arrived whole
        self.got: list[str] = []  # paths that were downloaded
        self.uploads = itertools.count()
        self.cut = lambda number: False  # which upload breaks off (whatever is asked, if it stays)
        self.cut_download = lambda path: False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader sees."""
        repo = self.repos[name]
        found = repo.commits[repo.branches.get(revision, revision)]
        return {path: self.blobs[blob] for path, (blob, _) in found.items()}

    def keep(self, data: bytes) -> str:
        blob = hashlib.sha256(data).hexdigest()
        self.blobs[blob] = data
        return blob


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, value=None, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self, count=None) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]) if count is None else count)

    def route(self):
        path = unquote(urlsplit(self.path).path)
        for pattern, name in ROUTES.get(self.command, {}).items():
            found = re.fullmatch(pattern, path)
            if found:
                return getattr(self, name)(*found.groups())
        return self.answer({"error": f"no such route: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = route

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str) -> Repo | None:
        """The repository, unless this caller must not know of it."""
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.authorized):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        return found

    def files_of(self, name: str, revision: str):
        """(commit, its files), or an answer that says what is missing."""
        repo = self.repo(name)
        if repo is None:
            return None
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    def who(self):
        self.answer({"name": "me", "type": "user"} if self.authorized else {}, 200)

    def create(self):
        if not self.authorized:
            return self.answer({"error": "Invalid username or password."}, 401)
        asked = json.loads(self.body())
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.server.repos:
            told = {"error": "You already created this model repo"}
            return self.answer(told | {"url": f"{self.server.url}/{name}"}, 409)
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": (self.server.keep(b"*.safetensors lfs\n"), False)})
        return self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def create_branch(self, name, branch):
        repo = self.repo(name)
        if repo is None:
            return None
        self.body()
        if branch in repo.branches:
            return self.answer({"error": "Reference already exists"}, 409)
        repo.branches[branch] = repo.branches["main"]
        return self.answer({})

    def validate_card(self):
        """The hub refuses a base_model that is none of its ids."""
        front = json.loads(self.body())["content"].split("---")[1]
        named = re.search(r"^base_model: (.*)$", front, re.MULTILINE)
        if named and not re.fullmatch(r"[\w.-]+/[\w.-]+", named[1].strip('"')):
            error = {"message": f'"base_model" with value {named[1]} is not valid.'}
            return self.answer({"errors": [error], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def info(self, name, revision=None):
        found = self.files_of(name, revision or "main")
        if found is None:
            return None
        sha, files = found
        siblings = []
        for path, (blob, large) in files.items():
            data = self.server.blobs[blob]
            one = {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
            if large:
                one["lfs"] = {"size": len(data), "sha256": blob, "pointerSize": 130}
            siblings.append(one)
        private = self.server.repos[name].private
        return self.answer({"id": name, "sha": sha, "private": private, "siblings": siblings})

    def preupload(self, name, revision):
        found = self.files_of(name, revision)
        if found is None:
            return None
        files = []
        for one in json.loads(self.body())["files"]:
            mode = "lfs" if one["path"].endswith(LARGE) else "regular"
            there = found[1].get(one["path"])
            oid = there and (there[0] if there[1] else git_hash(self.server.blobs[there[0]]))
            named = {"path": one["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(named | ({"oid": oid} if oid else {}))
        return self.answer({"files": files})

    def batch(self, name):
        if self.repo(name) is None:
            return None
        objects = []
        for one in json.loads(self.body())["objects"]:
            if one["oid"] not in self.server.blobs:
                url, size = f"{self.server.url}/lfs/{one['oid']}", one["size"]
                upload = {"href": url}
                if size > PART:
                    upload["header"] = {"chunk_size": str(PART)} | {
                        str(i + 1): f"{url}/{i + 1}" for i in range(-(-size // PART))
                    }
                verify = {"href": f"{self.server.url}/verify"}
                one["actions"] = {"upload": upload, "verify": verify}
            objects.append(one)
        return self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid, part=None):
        size = int(self.headers["Content-Length"])
        if self.server.cut(next(self.server.uploads)):
            self.body(size // 2)
            return self.hang_up()
        data = self.body()
        self.server.sent.append((oid, len(data)))
        if part is not None:
            self.server.parts[oid, int(part)] = data
        elif self.server.keep(data) != oid:
            return self.answer({"error": "wrong SHA-256"}, 400)
        return self.answer({}, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def complete(self, oid):
        parts = [self.server.parts[oid, p["partNumber"]] for p in json.loads(self.body())["parts"]]
        right = self.server.keep(b"".join(parts)) == oid
        return self.answer({}, 200 if right else 400)

    def verify(self):
        asked = json.loads(self.body())
        right = len(self.server.blobs.get(asked["oid"], b"")) == asked["size"]
        return self.answer({}, 200 if right else 404)

    def commit(self, name, revision):
        found = self.files_of(name, revision)
        if found is None:
            return None
        (sha, before), told = found, [json.loads(line) for line in self.body().splitlines()]
        files = dict(before)
        for key, value in ((one["key"], one["value"]) for one in told):
            if key == "header" and value.get("parentCommit") not in (None, sha):
                return self.answer({"error": "A commit has happened since"}, 412)
            if key == "file":
                files[value["path"]] = (self.server.keep(base64.b64decode(value["content"])), False)
            elif key == "lfsFile" and value["oid"] not in self.server.blobs:
                return self.answer({"error": f"no such object: {value['path']}"}, 400)
            elif key == "lfsFile":
                files[value["path"]] = (value["oid"], True)
            elif key == "deletedFile":
                del files[value["path"]]
        made = self.server.repos[name].commit(revision, files)
        return self.answer({"commitUrl": f"{self.server.url}/{name}/{made}", "commitOid": made})

    def resolve(self, name, revision, path):
        found = self.files_of(name, revision)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound")
        blob, large = files[path]
        data, tag = self.server.blobs[blob], blob if large else git_hash(self.server.blobs[blob])
        headers = {"X_Repo_Commit": sha, "ETag": f'"{tag}"'}
        if self.command == "GET":
            self.server.got.append(path)
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if self.command == "GET" and self.server.cut_download(path):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return self.hang_up()
        if span:
            start = int(span[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(data[start:], 206, **headers)
        return self.answer(data, **headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "POST": {
        "/api/repos/create": "create",
        "/api/validate-yaml": "validate_card",
        f"/api/models/{NAME}/branch/(.+)": "create_branch",
        f"/api/models/{NAME}/preupload/(.+)": "preupload",
        f"/api/models/{NAME}/commit/(.+)": "commit",
        rf"/{NAME}\.git/info/lfs/objects/batch": "batch",
        r"/lfs/(\w+)": "complete",
        "/verify": "verify",
    },
    "PUT": {r"/lfs/(\w+)": "put", r"/lfs/(\w+)/(\d+)": "put"},
    "GET": {
        "/api/whoami-v2": "who",
        f"/api/models/{NAME}": "info",
        f"/api/models/{NAME}/revision/(.+)": "info",
        f"/{NAME}/resolve/([^/]+)/(.+)": "resolve",
    },
}
ROUTES["HEAD"] = ROUTES["GET"]
