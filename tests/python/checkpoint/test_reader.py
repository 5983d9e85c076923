"""A damaged checkpoint names the file and the way out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_model

Config = Callable[..., GPTConfig]


def test_a_model_without_a_run_cannot_be_resumed(config: Config, tmp_path: Path) -> None:
    with make_model(config()) as model:
        model.save(tmp_path / "m")
        saved = Checkpoint(tmp_path / "m")
        assert saved.trainer() is None
        with pytest.raises(GptcError, match=r"holds no optimizer state; .* --init-from"):
            saved.restore_optimizer(model)
        with pytest.raises(GptcError, match=r"has no tokenizer: copy gptc_tokenizer\.json"):
            saved.tokenizer()


def load_all(folder: Path) -> None:
    """Reads everything that a resumed run needs."""
    saved = Checkpoint(folder)
    saved.tokenizer()
    with load_model(saved, training=True, threads=1) as model:
        saved.restore_optimizer(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", lambda b: b[:-10], "is truncated: {n} bytes expected, {m} found"),
        ("model.safetensors", lambda b: b + b"x", "has grown: {n} bytes expected"),
        ("model.safetensors", lambda b: b[:-1] + b"\x77", "was altered or damaged"),
        ("model.safetensors", lambda b: b"\xff" + b[1:], "was altered or damaged"),
        ("optimizer.safetensors", lambda b: b[:-1] + b"\x77", "was altered or damaged"),
        ("trainer.json", lambda b: b.replace(b"6", b"7", 1), "was altered or damaged"),
        ("gptc_tokenizer.json", lambda b: b.replace(b"bytes", b"chars"), "altered or damaged"),
        ("config.json", lambda b: b.replace(b"48", b"49"), "was altered or damaged"),
        ("model.safetensors", None, "is missing"),
        ("checksums.json", lambda b: b"{", "is damaged"),
        ("checksums.json", lambda b: b.replace(b'"version": 2', b'"version": 3'), "upgrade"),
        ("checksums.json", lambda b: b.replace(b"xxh3_128", b"xxh9_999"), "is damaged"),
    ],
)
def test_damage_names_the_file_and_the_way_out(
    run: Path, name: str, content: Callable[[bytes], bytes] | None, message: str
) -> None:
    folder = run / "ckpt-000006"
    before = (folder / name).read_bytes()
    if content is None:
        (folder / name).unlink()
    else:
        after = content(before)
        assert after != before
        (folder / name).write_bytes(after)
        message = message.format(n=f"{len(before):,}", m=f"{len(after):,}")
    with pytest.raises(GptcError) as caught:
        load_all(folder)
    assert message in str(caught.value)
    assert str(folder / name) in str(caught.value)
    if "upgrade" not in message:
        assert str(caught.value).endswith(f"; use {run / 'ckpt-000003'} instead")


def test_checkpoints_of_before_xxh3_are_still_checked(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with make_model(config()) as model:
        save(folder, model, tokenizer=make_tokenizer("bytes"))
    sums = folder / "checksums.json"
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path != sums
    }
    sums.write_text(json.dumps({"version": 1, "files": files}))
    load_model(Checkpoint(folder), threads=1).close()
    assert Checkpoint(folder).verify() == list(files)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    with pytest.raises(GptcError, match="altered or damaged"):
        Checkpoint(folder).verify()
    with pytest.raises(GptcError, match="altered or damaged"):
        load_model(Checkpoint(folder))
    for record in ({"size": 1}, {"size": 1, "sha256": 5}, {"size": 1, "checksum": "md5:0"}, 7):
        sums.write_text(json.dumps({"version": 1, "files": {"config.json": record}}))
        with pytest.raises(GptcError, match="is damaged"):
            Checkpoint(folder).verify()


def test_a_later_trainer_version_is_refused(run: Path) -> None:
    folder = run / "ckpt-000006"
    data = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps({**data, "version": 9}))
    (folder / "checksums.json").unlink()
    with pytest.raises(GptcError, match=r"trainer\.json has version 9, .* up to 1: upgrade"):
        _ = Checkpoint(folder).step
