"""A file that is not a model is refused, and the message says which file to give instead.

The class: messages about something else, such as damage of a file that is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptc.convert.export_model import export_model
from gptc.engine.config import GPTConfig
from gptc.errors import GptcError
from gptc.formats.registry import detect
from small_models import make_checkpoint

Config = Callable[..., GPTConfig]


def test_detection_names_what_is_no_model(config: Config, tmp_path: Path) -> None:
    source = make_checkpoint(config("gpt2"), folder=tmp_path / "source")
    export_model(source, "llm.c", tmp_path / "m.bin")
    with pytest.raises(GptcError, match=r"m_tokenizer\.bin is a tokenizer of llm\.c, not a model"):
        detect(tmp_path / "m_tokenizer.bin")
    (tmp_path / "data").write_bytes(bytes(range(200)))
    with pytest.raises(GptcError, match=r"data is not a recognised model or token shard"):
        detect(tmp_path / "data")
    for name, content, words in (
        ("empty.bin", "", "empty.bin is empty"),
        ("gptc_tokenizer.json", "{}", f"name the folder, {tmp_path}"),
        ("metrics.jsonl", "{}", f"name the folder, {tmp_path}"),
        ("chats.jsonl", "{}", "has rows, not a model: train on them with gptc finetune -m MODEL"),
        ("alpaca.json", " [{}]", "has rows, not a model"),
        ("ll_tokenizer.bin", "abcdefgh", "is the tokenizer of a model: name the model's file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(GptcError, match=words):
            detect(tmp_path / name)
    for i, text in enumerate(
        ["Once upon a time", "\ufeffd\u00e9j\u00e0\r\n\tvu", "\u65e5\u672c" * 999]
    ):
        file = tmp_path / f"a text {i}"
        file.write_text(text)
        with pytest.raises(GptcError, match=f"is a text, .* gptc train --data '{file}'"):
            detect(file)
    with pytest.raises(GptcError, match=r"holds weights only; give its folder"):
        detect(tmp_path / "source" / "model.safetensors")
