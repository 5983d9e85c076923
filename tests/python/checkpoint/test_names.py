"""A model's name for people is that of its run, folder or file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptc.checkpoint.names import model_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/tiny-book/ckpt-000010", "tiny-book"),
        ("runs/tiny-book/best", "tiny-book"),
        ("models/gpt2", "gpt2"),
        ("models/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
    ],
)
def test_a_name(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    if file.suffix:
        file.parent.mkdir(parents=True)
        file.touch()
    elif file.name == "best":
        (file.parent / "ckpt-000010").mkdir(parents=True)
        file.symlink_to("ckpt-000010")
    else:
        file.mkdir(parents=True)
    assert model_name(file) == name
