"""A model's name for people is that of its run, folder or file."""

from __future__ import annotations

import re
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
        ("hub/models--openai-community--gpt2/snapshots/607a30d7", "gpt2"),
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


def test_a_link_is_a_name(tmp_path: Path) -> None:
    """The hub's cache has links to files that are named by a checksum; people make links, too."""
    (tmp_path / "5f1a2b").touch()
    (tmp_path / "SmolLM2.gguf").symlink_to("5f1a2b")
    assert model_name(tmp_path / "SmolLM2.gguf") == "SmolLM2"
    (tmp_path / "runs" / "poems" / "ckpt-000010").mkdir(parents=True)
    (tmp_path / "current").symlink_to("runs/poems/ckpt-000010")
    assert model_name(tmp_path / "current") == "current"
    (tmp_path / "latest").symlink_to("runs/poems")
    assert model_name(tmp_path / "latest" / "ckpt-000010") == "latest"


def test_a_path_upwards_and_a_folder_of_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "snapshots" / "run7").mkdir(parents=True)
    (tmp_path / "current").symlink_to("snapshots/run7")
    monkeypatch.chdir(tmp_path / "here")
    assert model_name(Path("../current")) == "current"
    assert model_name(Path("../snapshots/run7")) == "run7"
    assert model_name(Path()) == "here"
    assert model_name(Path("..")) == tmp_path.name


def test_the_name_that_the_page_about_serving_uses() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "serve.md").read_text("utf-8")
    served = set(re.findall(r"gptc serve -m (\S+)", text))
    asked = set(re.findall(r'model="([^"]+)"', text))
    assert asked == {Path(file).stem for file in served}
