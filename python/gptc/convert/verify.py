"""Checks of a whole file: models, datasets, shards, tokenizers.

verify("stories.gguf")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint, open_folder
from gptc.checkpoint.names import ADAPTER, CONFIG, RUN_CONFIG, list_checkpoints
from gptc.data.dataset import Dataset
from gptc.data.description import DATASET_FILE, SPLITS
from gptc.data.shards import is_shard, open_shard
from gptc.errors import GptcError, NoTokenizer, UnknownTokenizer, UsageError
from gptc.eval.ngram_file import is_ngrams, open_ngrams
from gptc.files.whole import restore
from gptc.formats import llmc
from gptc.formats.binary import Binary
from gptc.formats.model_file import ModelFile, check_finite
from gptc.formats.registry import is_foreign, open_model
from gptc.formats.safetensors import TensorFile


def verify(path: str | Path) -> dict[str, Any]:
    """Reads all of a model, dataset, shard or tokenizer file. GptcError names the first fault.

    Returns the path, the format, and a line for each check.
    """
    path = Path(path)
    restore(path)
    if not path.exists():
        raise GptcError(f"{path} does not exist; name a model, checkpoint, dataset or shard")
    kind, checks = _verify_folder(path) if path.is_dir() else _verify_file(path)
    return {"path": str(path), "format": kind, "checks": checks}


def _verify_folder(path: Path) -> tuple[str, list[str]]:
    if (path / DATASET_FILE).is_file():
        dataset = Dataset.open(path)
        dataset.verify()
        n_shards = sum(len(dataset.shards(split)) for split in SPLITS)
        return "dataset", [f"{n_shards} shards: checksums right, every token in the vocabulary"]
    if is_ngrams(path):
        file = open_ngrams(path)
        n_ngrams = sum(len(order.keys) for order in file.model.orders)
        n_tokens = file.tokenizer.vocab_size
        return "n-grams", [
            f"{n_ngrams:,} n-grams up to order {file.model.order}: checksum right, keys in order",
            f"{file.tokenizer.kind} tokenizer, {n_tokens:,} tokens",
        ]
    if (path / CONFIG).is_file() or (path / ADAPTER).is_file() or is_foreign(path):
        model = open_checkpoint(path)
        return model.format, _verify_model(model)
    saved = list_checkpoints(path)
    if saved:
        return "run", _verify_checkpoints(saved)
    if (path / RUN_CONFIG).is_file():
        find_checkpoint(path)  # its error names the command that begins the run again
    raise GptcError(f"{path} holds no model, run or dataset; name a file or folder that does")


def _verify_checkpoints(folders: list[Path]) -> list[str]:
    """The checks of each. GptcError names all that are damaged, and those that are whole."""
    checks, whole, problems = [], [], []
    for folder in folders:
        try:
            checks += [f"{folder.name}: {line}" for line in _verify_model(open_folder(folder))]
            whole.append(folder.name)
        except UsageError:  # of the variable GPTC_LIMITS
            raise
        except GptcError as error:
            problems.append(str(error))
    if problems:
        raise GptcError("; ".join([*problems, f"whole are: {', '.join(whole) or 'none'}"]))
    return checks


def _verify_model(model: ModelFile) -> list[str]:
    checks = model.check()
    try:
        tokenizer = model.tokenizer()
    except (NoTokenizer, UnknownTokenizer) as error:
        return [*checks, f"no tokenizer: {error}"]
    return [*checks, f"{tokenizer.kind} tokenizer, {tokenizer.vocab_size:,} tokens"]


def _verify_file(path: Path) -> tuple[str, list[str]]:
    if path.suffix == ".safetensors":
        tensors = TensorFile(path)
        for name in tensors.entries:
            check_finite(tensors.read(name), f"{path}: {name}")
        return "safetensors", [f"{len(tensors.entries)} tensors, every number finite"]
    if is_shard(path):
        shard = open_shard(path)
        return "shard", [f"{shard.n_tokens:,} tokens, the largest {max(0, shard.largest()):,}"]
    magic = int.from_bytes(Binary(path).peek(0, 4), "little")
    if magic == llmc.TOKENIZER_MAGIC:
        return "llm.c tokenizer", [f"{llmc.read_tokenizer(path).vocab_size:,} tokens"]
    if magic == llmc.STATE_MAGIC:
        return "llm.c debug state", _verify_state(path)
    model = open_model(path)
    return model.format, _verify_model(model)


def _verify_state(path: Path) -> list[str]:
    """Compares a debug state with the results of the model next to it."""
    model_file = path.with_name(path.name.replace("_debug_state", ""))
    if model_file == path or not model_file.is_file():
        raise GptcError(f"{path} is checked with its model: put {model_file.name} in its folder")
    given = llmc.LlmcModel(model_file)
    state = llmc.DebugState(path, given.config)
    inputs, targets = state.tokens("inputs"), state.tokens("targets")
    B, T = inputs.shape
    with load_model(given, training=True, max_batch=B, max_seq=T) as model:
        differences = {
            "logits": float(np.abs(model.logits(inputs) - state.logits).max()),
            "loss": abs(model.backward(inputs, targets) - state.loss),
            "gradients": max(
                float(np.abs(model.read(name, "grad") - state.gradient(name)).max())
                for name, _, _ in given.config.parameters()
            ),
        }
    # llm.c's own test allows as much.
    for what, difference in differences.items():
        if not difference <= 1e-2:
            raise GptcError(f"{path}: {what} off by {difference:g} from what {model_file} computes")
    return [f"{what} off by at most {d:.2g}" for what, d in differences.items()]
