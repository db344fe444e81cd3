"""A stand-in for the Hugging Face hub on this machine: what its API says of models and data sets, and their files."""

import contextlib
import functools
import hashlib
import json
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Serves the folders FOLDER/models/OWNER/NAME and FOLDER/datasets/OWNER/NAME, as they are when they are asked for.

    `fetched` counts the GETs of each file, `asked` all requests. With `silent` no request is answered any more.
    """

    def __init__(self, folder: Path):
        self.folder, self.fetched, self.asked = folder, Counter(), 0
        self.silent = threading.Event()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def serve(self) -> Iterator["Hub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield self
        finally:
            self._ended.set()
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that asks this hub and keeps what comes below `home`."""
        caches = {"HF_HUB_CACHE": str(home / "hub"), "HF_DATASETS_CACHE": str(home / "datasets")}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **caches}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        self.asked += 1
        if self.silent.is_set():
            self._ended.wait()
        parts = [p for p in path.split("/") if p]
        api = parts[0] == "api"
        parts = parts[api:]
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo, verb, rest = "/".join(parts[:2]), "".join(parts[2:3]), "/".join(parts[4:])  # parts[3]: the revision
        files = self._files(kind, repo)
        if not files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if not api:
            if rest not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            self.fetched[f"{repo}/{rest}"] += method == "GET"
            return 200, {"ETag": f'"{_oid(files[rest])}"', "X-Repo-Commit": commit}, files[rest]
        if verb in ("tree", "paths-info"):
            asked = urllib.parse.parse_qs(body.decode()).get("paths", []) if verb == "paths-info" else list(files)
            if verb == "paths-info" and body.startswith(b"{"):
                asked = json.loads(body)["paths"]
            inside = [p for p in files if p in asked and (verb == "paths-info" or p.startswith(rest))]
            answer: object = [{"type": "file", "oid": _oid(files[p]), "size": len(files[p]), "path": p} for p in inside]
        else:
            answer = {"id": repo, "sha": commit, "tags": [], "siblings": [{"rfilename": p} for p in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def _files(self, kind: str, repo: str) -> dict[str, bytes]:
        root = self.folder / kind / repo
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args):
        self._hub = hub
        super().__init__(*args)

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self._hub.answer(self.command, urllib.parse.urlsplit(self.path).path, body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = _respond

    def log_message(self, *args) -> None:
        pass
