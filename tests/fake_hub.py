"""A Hub on this machine: as much of its HTTP as huggingface_hub needs to fetch a repository; and what it was asked for."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class FakeHub(ThreadingHTTPServer):
    """Serves `repositories`: a list of folders, one a commit, by ORG/REPO; the last is `main`. A context manager."""

    def __init__(self, repositories: dict[str, list[Path]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, number: int = -1) -> str:
        numbers = range(len(self.repositories[repository]))
        return hashlib.sha1(f"{repository}{numbers[number]}".encode()).hexdigest()

    def folder(self, repository: str, revision: str) -> tuple[str, Path] | None:
        commits = {self.commit(repository, n): path for n, path in enumerate(self.repositories.get(repository, []))}
        revision = list(commits)[-1] if revision == "main" and commits else revision
        return (revision, commits[revision]) if revision in commits else None

    def __enter__(self) -> "FakeHub":
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        info = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if info else parts[:2])
        revision = parts[5] if info and len(parts) > 5 else "main" if info else parts[3]
        found = self.server.folder(repository, revision)
        if found is None:
            self.send_response(404)
            known = repository in self.server.repositories
            self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        commit, folder = found
        headers = {"X-Repo-Commit": commit}
        if info:
            content = self._info(repository, commit, folder, tree=parts[4:5] == ["tree"])
            headers["Content-Type"] = "application/json"
        else:
            content = (folder / parts[4]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _info(self, repository: str, commit: str, folder: Path, *, tree: bool) -> bytes:
        files = sorted(file.name for file in folder.iterdir())
        if tree:
            sizes = {name: (folder / name).stat().st_size for name in files}
            return json.dumps([{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in files]).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}).encode()

    def log_message(self, format: str, *args: Any) -> None:
        pass
