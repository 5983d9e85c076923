"""Adapters into the files of other programs: peft's folder, and GGUF for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gptc.checkpoint.merged import Adapters, open_adapters
from gptc.errors import GptcError, UsageError
from gptc.files.whole import restore, whole_folder, write_chunks, write_file
from gptc.formats import gguf_lora, peft
from gptc.formats.model_file import ModelFile
from gptc.formats.safetensors import tensor_chunks

FORMATS = ("hf", "gguf")


def export_adapter(
    base: ModelFile, adapters: Adapters, to: str, out: str | Path, *, replace: bool = False
) -> None:
    """Writes adapters without their base, and reads them back: the numbers must be the same."""
    path = Path(out)
    if to not in FORMATS:
        raise UsageError(f"{to} has no adapters: add --merge, or use --to {' or '.join(FORMATS)}")
    restore(path)
    if path.exists() and not replace:
        raise UsageError(f"{path} exists already; choose another name, or replace it with --force")
    lora = adapters.lora
    if to == "gguf":
        write_file(path, b"".join(gguf_lora.chunks(base.config, lora, adapters.read)))
    else:
        name = str(base.path.resolve()) if base.path.exists() else str(base.path)
        described = json.dumps(peft.config_to_json(base.config, lora, name), indent=2) + "\n"
        shapes = peft.tensor_shapes(base.config, lora)
        read = peft.tensor_reader(base.config, lora, adapters.read)
        with whole_folder(path) as folder:
            write_chunks(folder / peft.CONFIG, [described.encode()])
            write_chunks(folder / peft.WEIGHTS, tensor_chunks(shapes, read))
    again = open_adapters(path, base)
    for ours, _, _ in lora.parameters(base.config):
        if not np.array_equal(again.read(ours), adapters.read(ours)):
            raise GptcError(f"{path} reads back with other numbers of {ours}")
