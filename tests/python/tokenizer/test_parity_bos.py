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
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_config
from vocabularies import LLAMA, PROMPT, begun, byte_level, llama_like, published, template

Gptc = Callable[..., Any]
needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs transformers",
)
PROMPTS = ["the cat sat", "Once upon a time, there was", "naïve 東京 😀\n\nx", "a", ""]


def by_transformers(folder: Path, prompts: list[str], n: int) -> list[tuple[list[int], list[int]]]:
    """For each prompt: its ids, and the greedy continuation of `n` ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        ids = given.input_ids[0].long().tolist()
        written = []
        if ids:
            out = model.generate(
                input_ids=given.input_ids, attention_mask=given.attention_mask,
                do_sample=False, max_new_tokens=n, pad_token_id=0,
            )  # fmt: skip
            written = out[0, len(ids) :].tolist()
        results.append((ids, written))
    return results


@pytest.fixture(scope="module", params=["small", "llama 2"])
def source(request: Any, tmp_path_factory: Any) -> tuple[Path, Tokenizer]:
    """A folder as it is published, and its tokenizer."""
    pytest.importorskip("sentencepiece")
    if request.param == "llama 2" and not LLAMA.is_file():
        pytest.skip("no llama2-tokenizer.model")
    tokenizer = llama_like() if request.param == "small" else make_tokenizer(str(LLAMA))
    return published(tmp_path_factory.mktemp("source") / "published", tokenizer), tokenizer


@pytest.mark.parity
@needs_transformers
@pytest.mark.parametrize("sort", ["published", "imported", "gguf", "trained"])
def test_the_ids_and_the_greedy_text_are_transformers(
    tmp_path: Path, source: tuple[Path, Tokenizer], sort: str, gptc: Gptc
) -> None:
    folder, tokenizer = source
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
    results = [
        (prompt, ids, written)
        for prompt, (ids, written) in zip(
            PROMPTS, by_transformers(folder, PROMPTS, 16), strict=True
        )
        if ids
    ]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _, _ in results))
    ran = gptc(
        "infer", "-m", folder, "--prompts", lines, "--temperature", 0, "--max-tokens", 16,
        "--dtype", "fp32",
    )  # fmt: skip
    answers = [json.loads(line) for line in ran.out.splitlines()]
    for (prompt, ids, written), answer in zip(results, answers, strict=True):
        assert ids == prompt_tokens(ours, prompt)
        end = next((i for i, token in enumerate(written) if token in (1, 2)), len(written))
        text = ours.decode(written[:end], continued=prompt != "")
        assert answer["samples"][0]["text"] == text
    n_begun = sum(ids[0] == 1 for _, ids, _ in results)
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
