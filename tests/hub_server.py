"""A Hugging Face hub on this machine, with as much of its API as huggingface_hub, datasets and evaluate ask for.

Repositories are folders. `HF_ENDPOINT` tells the libraries where it is.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = ("models", "datasets", "spaces")


class HubServer(http.server.ThreadingHTTPServer):
    """`downloads` counts how often the contents of each file (`datasets/user/name/path`) were sent; `requests` are all
    of them. A change of a file is a new commit. A download of `held` sets `reached`, and waits until `released` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.downloads: Counter[str] = Counter()
        self.requests: list[str] = []
        self.held, self.reached, self.released = "", threading.Event(), threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, kind: str, name: str, folder: Path) -> None:
        assert kind in KINDS
        self.repositories[f"{kind}/{name}"] = folder

    @property
    def environment(self) -> dict[str, str]:
        """For processes that may use it; nothing of it is compressed or deduplicated."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def commit(self, repository: str) -> str:
        digest = hashlib.sha1()
        for path in self.files(repository):
            digest.update(f"{path} {self.oid(repository, path)}".encode())
        return digest.hexdigest()

    def files(self, repository: str) -> list[str]:
        root = self.repositories[repository]
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    def oid(self, repository: str, path: str) -> str:
        return hashlib.sha1((self.repositories[repository] / path).read_bytes()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up or were killed

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        if api := re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?(?:/(.*))?", path
        ):
            kind, name, verb, revision, below = api.groups()
            self.api(f"{kind}/{name}", verb, revision, below or "", body)
        elif file := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, below = file.groups()
            self.file(f"{kind or 'models'}/{name}", revision, below)
        else:
            self.error("EntryNotFound")

    def known(self, repository: str, revision: str | None) -> bool:
        if repository not in self.server.repositories:
            self.error("RepoNotFound")
        elif revision not in (None, "main", self.server.commit(repository)):
            self.error("RevisionNotFound")
        else:
            return True
        return False

    def api(self, repository: str, verb: str | None, revision: str | None, below: str, body: bytes) -> None:
        if not self.known(repository, revision):
            return
        files = self.server.files(repository)
        if verb in (None, "revision"):
            name = repository.partition("/")[2]
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "sha": self.server.commit(repository), "siblings": siblings, "tags": []}
            self.reply(json.dumps(facts).encode())
        elif verb == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            self.reply(json.dumps(self.tree(repository, below, recursive)).encode())
        elif verb == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            self.reply(json.dumps(self.entries(repository, [f for f in files if f in asked])).encode())
        else:
            self.error("EntryNotFound")

    def tree(self, repository: str, below: str, recursive: bool) -> list[dict[str, Any]]:
        root = self.server.repositories[repository]
        listed = (root / below).rglob("*") if recursive else (root / below).glob("*")
        paths = sorted(path.relative_to(root).as_posix() for path in listed)
        folders = [path for path in paths if (root / path).is_dir()]
        oids = {path: hashlib.sha1(path.encode()).hexdigest() for path in folders}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": oid} for path, oid in oids.items()]
        return entries + self.entries(repository, [path for path in paths if path not in oids])

    def entries(self, repository: str, paths: list[str]) -> list[dict[str, Any]]:
        root = self.server.repositories[repository]
        oid = self.server.oid
        return [
            {"type": "file", "path": path, "size": (root / path).stat().st_size, "oid": oid(repository, path)}
            for path in paths
        ]

    def file(self, repository: str, revision: str, path: str) -> None:
        if not self.known(repository, revision):
            return
        whole = self.server.repositories[repository] / path
        if not whole.is_file():
            self.error("EntryNotFound", {"X-Repo-Commit": self.server.commit(repository)})
            return
        if self.command == "GET":
            with self.server.lock:
                self.server.downloads[f"{repository}/{path}"] += 1
            if self.server.held == f"{repository}/{path}":
                self.server.reached.set()
                self.server.released.wait(120)
        etag = f'"{self.server.oid(repository, path)}"'
        headers = {"X-Repo-Commit": self.server.commit(repository), "ETag": etag}
        self.reply(whole.read_bytes(), headers=headers)

    def error(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.reply(b"", 404, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def reply(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
