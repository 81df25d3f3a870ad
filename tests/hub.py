"""A stand-in for the Hugging Face hub on this machine: what its client asks for to list and download repositories."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0" * 40


@contextlib.contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories, "datasets/OWNER/NAME" for data sets; gives the address and what was downloaded."""
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def answer(self, body: bool) -> None:
            path = unquote(self.path).partition("?")[0].strip("/")
            for repository, folder in repositories.items():
                api = repository if repository.startswith("datasets/") else f"models/{repository}"
                files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
                if path == f"api/{api}/revision/main" or path == f"api/{api}":
                    listed = {"id": repository.removeprefix("datasets/"), "sha": COMMIT,
                              "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
                    return self.send(json.dumps(listed).encode(), body)
                if path.startswith(f"api/{api}/tree/"):
                    tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0"} for n, f in files.items()]
                    return self.send(json.dumps(tree).encode(), body)
                for revision in ("main", COMMIT):
                    name = path.removeprefix(f"{repository}/resolve/{revision}/")
                    if name != path and name in files:
                        downloaded.extend([f"{repository}/{name}"] if body else [])
                        return self.send(files[name].read_bytes(), body)
            self.send(b"{}", body, 404)

        def send(self, content: bytes, body: bool, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
