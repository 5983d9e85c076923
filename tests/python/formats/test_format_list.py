"""The list of formats: what follows from it, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.config import GPTConfig
from gptc.formats import llama2c
from gptc.formats.format import Export
from gptc.formats.registry import FORMATS, WRITERS, detect


def test_names_are_those_of_the_models() -> None:
    names = [known.name for known in FORMATS]
    assert len(set(names)) == len(names)
    for known in FORMATS:
        assert known.name == getattr(known.open, "format", None)
        assert (known.write is None) == (not known.dtypes)


def test_importing_all_formats_imports_no_heavy_package() -> None:
    code = (
        "import sys, gptc.formats.registry;"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf', 'tiktoken', 'tokenizers',"
        " 'sentencepiece', 'requests', 'pyarrow', 'click', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "[]\n"


def test_a_width_that_looks_like_a_pickle_is_llama2c(
    config: Callable[..., GPTConfig], tmp_path: Path
) -> None:
    # The first bytes of version 0 are the width: 640 is 80 02 in hexadecimal, as a pickle begins.
    shape = config("llama", n_layer=1, n_embd=640, n_ff=64, n_head=8, n_kv_head=8)
    with Model.create(shape, threads=1, training=False) as model:
        model.save(tmp_path / "m")
    path = tmp_path / "m.bin"
    request = Export(Checkpoint(tmp_path / "m"), path, "fp32", None, load_model)
    (file,) = llama2c.write(request)
    path.write_bytes(b"".join(file.chunks))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert detect(path) is WRITERS["llama2.c"]
