"""With a token that begins a text, ids and greedy text are those of transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.convert.export_model import export_model
from gptc.convert.import_model import import_model
from gptc.generation.request import prompt_tokens
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config
from vocabularies import LLAMA, PROMPT, begun, byte_level, llama_like, published, template

Gptc = Callable[..., Any]
needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs transformers",
)
PROMPTS = ["the cat sat", "Once upon a time, there was", "naïve 東京 😀\n\nx", "a", ""]


def by_transformers(folder: Path, prompt: str, n: int) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and the greedy continuation of `n` ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(prompt, return_tensors="pt")
    ids = given.input_ids[0].long().tolist()
    if not ids:
        return ids, []
    out = model.generate(
        input_ids=given.input_ids, attention_mask=given.attention_mask,
        do_sample=False, max_new_tokens=n, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    return ids, out[len(ids) :]


@pytest.mark.parity
@needs_transformers
@pytest.mark.parametrize("kind", ["small", "llama 2"])
@pytest.mark.parametrize("sort", ["published", "imported", "gguf", "trained"])
def test_the_ids_and_the_greedy_text_are_transformers(
    tmp_path: Path, kind: str, sort: str, gptc: Gptc
) -> None:
    if kind == "llama 2" and not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    pytest.importorskip("sentencepiece")
    tokenizer = llama_like() if kind == "small" else make_tokenizer(str(LLAMA))
    folder = published(tmp_path / "published", tokenizer)
    if sort in ("imported", "gguf"):
        import_model(folder, tmp_path / "imported")
        folder = tmp_path / "imported"
    if sort == "gguf":
        export_model(open_checkpoint(folder), "gguf", tmp_path / "m.gguf")
        import_model(tmp_path / "m.gguf", tmp_path / "again")
        folder = tmp_path / "again"
    if sort == "trained":
        with load_model(open_checkpoint(folder), dtype="fp32") as model:
            model.save(tmp_path / "trained", begun(tokenizer, None))
        folder = tmp_path / "trained"
    ours = open_checkpoint(folder).tokenizer()
    n_begun = 0
    for prompt in PROMPTS:
        ids, written = by_transformers(folder, prompt, 16)
        if not ids:
            continue
        n_begun += ids[0] == 1
        assert ids == prompt_tokens(ours, prompt)
        ran = gptc(
            "infer", "-m", folder, "-p", prompt, "--temperature", 0, "--max-tokens", 16,
            "--dtype", "fp32", "--json",
        )  # fmt: skip
        end = next((i for i, token in enumerate(written) if token in (1, 2)), len(written))
        text = ours.decode(written[:end], continued=prompt != "")
        assert json.loads(ran.out)["samples"][0]["text"] == text
    assert n_begun == (0 if sort == "trained" else len(PROMPTS))


@pytest.mark.parity
@needs_transformers
def test_llama_3s_sort(tmp_path: Path) -> None:
    """Byte-level, with a special token at the beginning, after another processor."""
    from transformers import AutoTokenizer

    folder = tmp_path / "llama3"
    shutil.copytree(byte_level(tmp_path).parent, folder, dirs_exist_ok=True)
    definition = json.loads((folder / "tokenizer.json").read_text())
    token = len(definition["model"]["vocab"])
    entry = {**definition["added_tokens"][0], "id": token, "content": "<|begin_of_text|>"}
    definition["added_tokens"].append(entry)
    level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    begin = template("<|begin_of_text|>", token)
    definition["post_processor"] = {"type": "Sequence", "processors": [level, begin]}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = make_tokenizer(str(folder))
    assert tokenizer.bos == token
    with Model.create(make_config("llama", vocab_size=token + 1), threads=1) as model:
        model.save(tmp_path / "model", tokenizer)
    for path in (folder, tmp_path / "model"):
        theirs = AutoTokenizer.from_pretrained(path)
        assert theirs(PROMPT).input_ids == prompt_tokens(tokenizer, PROMPT)
