"""Models of other programs into checkpoints.

import_model("stories15M.bin", "stories")
"""

from __future__ import annotations

from pathlib import Path

from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.names import PACKED
from gptc.checkpoint.writer import save
from gptc.errors import GptcError, UsageError
from gptc.files.words import quoted
from gptc.formats import families, hf
from gptc.formats.model_file import ModelFile, merge_first
from gptc.formats.registry import detect, is_foreign
from gptc.tokenizer.base import Tokenizer

_WIDENED = "quantized matrices are float32 in the checkpoint: llama.cpp computes no such model"
_LONGROPE = (
    "in a context of more than {:,} tokens, shorter texts have the frequencies of long ones, as in "
    "llama.cpp; transformers chooses by the text"
)
_KEPT = "quantized matrices stay as they are, in {}"
WITHOUT_TOKENIZER = "without a tokenizer:"  # how a note about that begins


def import_model(
    path: str | Path,
    out: str | Path,
    tokenizer: Tokenizer | None = None,
    **assumed: int,
) -> ModelFile:
    """Writes the model at `path`, in any format, as a checkpoint folder; returns the model file.

    The quantized matrices of a GGUF file stay as they are: the folder has a model.gguf then.
    `assumed` are fields of the config that the file does not store. AdamW's moments are kept when
    the file holds them.
    """
    model = open_assuming(path, **assumed)
    if model.lora is not None:
        raise UsageError(f"{path} holds adapters, not a model: {merge_first(path)}")
    if tokenizer is None:
        tokenizer, notes = tokenizer_or_note(model)
        model.notes += notes
    elif tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size:,} tokens, and "
            f"{model.path} a vocabulary of {model.config.vocab_size:,}; choose another"
        )
    if model.config.rope_scaling == "longrope":
        model.notes += (_LONGROPE.format(model.config.rope_original),)
    packed = bool(model.packing()) and families.of(model.config) is not None
    if model.packing():
        model.notes += ((_KEPT if packed else _WIDENED).format(quoted(Path(out) / PACKED)),)
    step = model.optimizer_step
    trainer = None if step is None else {"step": step, "imported_from": model.format}
    save(out, model, tokenizer=tokenizer, trainer=trainer, packed=packed)
    return model


def open_assuming(path: str | Path, **assumed: int) -> ModelFile:
    """The model at `path`. UsageError when a value is assumed that the file stores itself."""
    if not assumed:
        return open_checkpoint(path)
    found = detect(Path(path)) if is_foreign(Path(path)) else None
    if found is None or not found.assumes:
        name = found.name if found else hf.NAME
        raise UsageError(f"{path} ({name}) says itself how many heads and positions it has")
    return found.open(Path(path), **assumed)


def tokenizer_or_note(model: ModelFile) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """A model's tokenizer; when there is none that fits, a note that says so."""
    try:
        tokenizer = model.tokenizer()
    except GptcError as error:
        return None, (f"{WITHOUT_TOKENIZER} {error}",)
    n_tokens, n_rows = tokenizer.vocab_size, model.config.vocab_size
    if n_tokens > n_rows:
        why = f"it has {n_tokens:,} tokens, and the model {n_rows:,}"
        return None, (f"{WITHOUT_TOKENIZER} {why}",)
    return tokenizer, ()
