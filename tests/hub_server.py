"""A server on loopback that speaks as much of the Hub's protocol as publishing and loading need.

Repositories live in memory; a commit is a dictionary from path to content. Large files go the way
of Git LFS: asked for in a batch, sent by PUT, named by their hash in the commit.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


TOKEN = "hf_good"
LARGE = 10_000


@dataclass
class Repository:
    private: bool
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, files):
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.branches["main"] = files, sha
        return sha

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class State:
    repositories: dict = field(default_factory=dict)
    large: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    # Requests whose path has the word are cut off or refused so many more times.
    failures: dict = field(default_factory=dict)

    def fails(self, path):
        for word, count in self.failures.items():
            if word in path and count:
                self.failures[word] -= 1
                return True
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def state(self):
        return self.server.state

    def log_message(self, *_):
        pass

    def reply(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repository(self, kind, name):
        """Return a repository that this user may see; else refuse, as the Hub does."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        found = self.state.repositories.get((kind, name))
        if found is None or (found.private and token != TOKEN):
            self.refuse(401 if token != TOKEN else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def is_writer(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.body()
        self.reply(401, {"error": "Invalid user token."})
        return False

    def do_POST(self):
        path = urlparse(self.path).path
        self.state.requests.append(("POST", path))
        if self.state.fails(path):
            self.body()
            self.reply(503, {"error": "busy"})
        elif path == "/api/validate-yaml":
            self.body()
            self.reply(200, {"errors": [], "warnings": []})
        elif not self.is_writer():
            return
        elif path == "/api/repos/create":
            self.create()
        elif match := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            self.batch()
        elif match := re.fullmatch(r"/api/(models|datasets)/(.+)/(preupload|commit)/(.+)", path):
            kind, name, action, _ = match.groups()
            repository = self.repository(kind, name)
            if repository is not None:
                getattr(self, action)(repository, kind, name)
        else:
            self.refuse(404, "EntryNotFound", path)

    def create(self):
        wanted = json.loads(self.body())
        kind = f"{wanted.get('type', 'model')}s"
        name = "/".join(filter(None, (wanted["organization"], wanted["name"])))
        url = {"url": f"{self.server.address}/{name}"}
        if (kind, name) in self.state.repositories:
            self.reply(409, url | {"error": "You already created this repo"})
            return
        is_private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.state.repositories[kind, name] = Repository(is_private)
        self.state.repositories[kind, name].commit({})
        self.reply(200, url)

    def preupload(self, *_):
        files = json.loads(self.body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.reply(200, {"files": modes})

    def batch(self):
        objects = []
        for wanted in json.loads(self.body())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.state.large:
                href = f"{self.server.address}/upload/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        content = json.dumps({"transfer": "basic", "objects": objects}).encode()
        self.reply(200, content, Content_Type="application/vnd.git-lfs+json")

    def commit(self, repository, kind, name):
        files = dict(repository.commits[repository.branches["main"]])
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
        sha = repository.commit(files)
        url = f"{self.server.address}/{name}/commit/{sha}"
        self.reply(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def do_PUT(self):
        self.state.requests.append(("PUT", self.path))
        content = self.body()
        if self.state.fails(self.path):
            # Cut off in the middle: no answer ever comes.
            self.close_connection = True
            self.connection.close()
            return
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self.reply(400)
            return
        self.state.large[oid] = content
        self.reply(200)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        address = urlparse(self.path)
        path = unquote(address.path)
        self.state.requests.append((self.command, path))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            prefix, name, revision, file = match.groups()
            self.send_file("datasets" if prefix else "models", name, revision, file)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.+))?", path):
            kind, name, rest = match.groups()
            repository = self.repository(kind, name)
            if repository is not None:
                self.describe(repository, name, rest or "", parse_qs(address.query))
        else:
            self.refuse(404, "EntryNotFound", path)

    def describe(self, repository, name, rest, _query):
        action, _, where = rest.partition("/")
        revision = where.partition("/")[0] or "main"
        sha = repository.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Revision {revision} not found")
            return
        files = repository.commits[sha]
        if action == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in files.items()
            ]
            self.reply(200, entries)
            return
        self.reply(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            },
        )

    def send_file(self, kind, name, revision, file):
        repository = self.repository(kind, name)
        if repository is None:
            return
        sha = repository.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Revision {revision} not found")
        elif file not in repository.commits[sha]:
            self.refuse(404, "EntryNotFound", f"{file} not found")
        else:
            content = repository.commits[sha][file]
            headers = {"ETag": f'"{_oid(content)}"', "X_Repo_Commit": sha}
            self.reply(200, content, **headers)


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serve():
    """Yield a running server with its `address` and `state`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.state = State()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
