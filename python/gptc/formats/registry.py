"""The formats of other programs: all that gptc detects, opens and writes is one list, FORMATS.

    file = open_model(Path("stories15M.bin"))    # whatever it is
    file.config, file.read("wte.weight"), file.tokenizer()

To add a format, write a module with a class derived from `ModelFile`, a function `write` if gptc
shall write it, and `FORMAT = Format(...)` at its end; then add that to FORMATS. The commands, their
choices and their help follow. docs/formats.md has the recipe with the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptc.errors import GptcError
from gptc.files.words import quoted
from gptc.formats import gguf, heimerl, llama2c, llmc, nanogpt, openai_tf, qgpt
from gptc.formats.binary import Binary
from gptc.formats.format import Format
from gptc.formats.model_file import ModelFile

_BEGIN = 1000  # bytes of a file that tell whether it is a text

# In the order of detection. A Hugging Face folder is a checkpoint of our own: see checkpoint/.
FORMATS: tuple[Format, ...] = (
    gguf.FORMAT,
    llmc.FORMAT,
    llama2c.FORMAT,
    qgpt.FORMAT,
    heimerl.FORMAT,
    openai_tf.FORMAT,
    nanogpt.FORMAT,  # after those that have no magic number: two bytes are easily alike
)
WRITERS = {known.name: known for known in FORMATS if known.write is not None}


def is_foreign(path: Path) -> bool:
    """Whether `path` may be a model of another program, rather than a folder of ours."""
    return path.is_file() or any(known.detect(path, b"") for known in FORMATS)


def detect(path: Path) -> Format:
    """The format of the model at `path`. GptcError when there is none, or of no known kind."""
    begin = b"" if path.is_dir() else bytes(Binary(path).peek(0, 8))
    for known in FORMATS:
        if known.detect(path, begin):
            return known
    file = Binary(path)
    number = int.from_bytes(begin[:4], "little")
    if number in llmc.OTHER_FILES:
        what = llmc.OTHER_FILES[number]
        raise GptcError(f"{path} is {what} of llm.c, not a model; give its model file")
    if path.suffix == ".safetensors":
        raise GptcError(f"{path} holds weights only; give its folder, with the config.json")
    raise GptcError(f"{path} {_what_else(path, file)}")


def is_model(file: Path) -> bool:
    """Whether a file is a model of a format in FORMATS, by how it begins."""
    begin = bytes(Binary(file).peek(0, 8))
    return any(known.detect(file, begin) for known in FORMATS)


def open_model(path: Path, **assumed: Any) -> ModelFile:
    """The model of another program at `path`.

    `assumed` are fields of the config that the file does not store: `Format.assumes`.
    """
    return detect(path).open(path, **assumed)


def _what_else(path: Path, file: Binary) -> str:
    """The error about a file that begins as no model does."""
    if not file.size:
        return "is empty: copy it again"
    rows = path.suffix == ".jsonl" and path.name != "metrics.jsonl"
    if rows or (path.suffix == ".json" and bytes(file.peek(0, _BEGIN)).lstrip()[:1] == b"["):
        data = quoted(path)
        return (
            f"has rows, not a model: train on them with gptc finetune -m MODEL --data {data}, or "
            f"gptc train --data {data}"
        )
    if path.suffix in (".json", ".jsonl", ".toml"):
        return f"describes what its folder holds: name the folder, {path.parent}"
    if path.name.endswith("tokenizer.bin"):
        return "is the tokenizer of a model: name the model's file instead"
    if _is_text(bytes(file.peek(0, _BEGIN))):
        return f"is a text, not a model: train on it with gptc train --data {quoted(path)}"
    return (
        f"is not a recognised model or token shard (truncated? it has {file.size:,} bytes); known "
        f"formats: a Hugging Face folder, {', '.join(known.name for known in FORMATS)}"
    )


def _is_text(begin: bytes) -> bool:
    """Whether a file that begins so holds text."""
    text = begin.decode("utf-8", "replace").rstrip("\ufffd")  # the last character may be cut
    return bool(text) and all(c >= " " or c.isspace() for c in text) and "\ufffd" not in text
