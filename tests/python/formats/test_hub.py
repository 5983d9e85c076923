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


def test_a_model_by_its_name_on_the_hub(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    folder = make_checkpoint(config("llama"), folder=tmp_path / "source").path
    Hub.files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "checksums.json"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    here |= {"HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gptc", *arguments], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, **here, **environment}, check=False,
        )  # fmt: skip

    try:
        ran = run("infer", "-m", "owner/tiny", "-p", "Once", "--max-tokens", "3")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("Once")
        (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
        sizes = ("--steps", "1", "--batch-size", "1", "--seq-len", "16", "--eval-batches", "1")
        ran = run("train", "--init-from", "owner/tiny", "--data", "text.txt", *sizes)
        assert ran.returncode == 0, ran.stderr
        assert "saved runs/tiny-text/ckpt-000001" in ran.stderr
        ran = run("import", "owner/tiny", "--out", "got")
        assert ran.returncode == 0, ran.stderr
        assert np.array_equal(
            Checkpoint(tmp_path / "got").read("wte.weight"), Checkpoint(folder).read("wte.weight")
        )
        ran = run("info", "got", "--json")
        assert ran.returncode == 0
        ran = run("import", "owner/other", "--out", "no")
        assert ran.returncode == 1
        words = "owner/other does not exist here; check the path. Nor can a model of that name be"
        assert ran.stderr.startswith(f"gptc: error: {words} downloaded: the hub knows no such")
        assert len(ran.stderr.splitlines()) == 1
        ran = run("infer", "-m", "runs/tiny-texd")
        assert "does not exist here; did you mean runs/tiny-text? Nor can" in ran.stderr
    finally:
        server.shutdown()
    again = run("import", "owner/tiny", "--out", "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
