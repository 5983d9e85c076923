"""A model on the hub is downloaded by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.reader import Checkpoint
from gptc.engine.config import GPTConfig
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client needs for one model."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/tiny"):
            names = [{"rfilename": name} for name in self.files]
            listed = {"id": "owner/tiny", "sha": "0" * 40, "siblings": names, "private": False}
            if "/tree/" in self.path:
                entries = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40}
                           for n, d in self.files.items()]  # fmt: skip
                return self.reply(json.dumps(entries).encode(), "application/json")
            return self.reply(json.dumps(listed).encode(), "application/json")
        data = self.files.get(self.path.rpartition("/")[2])
        if data is None or "owner/tiny" not in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.reply(data, "application/octet-stream")

    do_HEAD = do_GET

    def reply(self, data: bytes, kind: str) -> None:
        import hashlib

        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


# Commands of one process: the hub's client takes a second to import. It reads variables then.
COMMANDS = """
import contextlib, io, json, sys
from gptc.cli import run
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def test_a_model_by_its_name_on_the_hub(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    folder = make_checkpoint(config("llama"), folder=tmp_path / "source").path
    Hub.files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "checksums.json"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    here |= {"HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*commands: list[str], **environment: str) -> list[tuple[int, str, str]]:
        ran = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(commands)], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, **here, **environment}, check=True,
        )  # fmt: skip
        return [tuple(found) for found in json.loads(ran.stdout)]

    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
    sizes = ["--steps", "1", "--batch-size", "1", "--seq-len", "16", "--eval-batches", "1"]
    try:
        inferred, trained, imported, described, unknown, mistyped = run(
            ["infer", "-m", "owner/tiny", "-p", "Once", "--max-tokens", "3"],
            ["train", "--init-from", "owner/tiny", "--data", "text.txt", *sizes],
            ["import", "owner/tiny", "--out", "got"],
            ["info", "got", "--json"],
            ["import", "owner/other", "--out", "no"],
            ["infer", "-m", "runs/tiny-texd"],
        )
    finally:
        server.shutdown()
    for code, _, said in (inferred, trained, imported, described):
        assert code == 0, said
    assert inferred[1].startswith("Once")
    assert "saved runs/tiny-text/ckpt-000001" in trained[2]
    assert np.array_equal(
        Checkpoint(tmp_path / "got").read("wte.weight"), Checkpoint(folder).read("wte.weight")
    )
    assert unknown[0] == 1
    words = "owner/other does not exist here; check the path. Nor can a model of that name be"
    assert unknown[2].startswith(f"gptc: error: {words} downloaded: the hub knows no such")
    assert len(unknown[2].splitlines()) == 1
    assert "does not exist here; did you mean runs/tiny-text? Nor can" in mistyped[2]
    ((code, _, said),) = run(["import", "owner/tiny", "--out", "again"], HF_HUB_OFFLINE="1")
    assert code == 0, said
