"""Models of other programs, made checkpoints."""

from __future__ import annotations

from pathlib import Path

from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.writer import save
from gptc.errors import GptcError, UsageError
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import detect, is_foreign, open_model
from gptc.tokenizer.base import Tokenizer


def import_model(
    path: str | Path,
    out: str | Path,
    tokenizer: Tokenizer | None = None,
    **assumed: int,
) -> ModelFile:
    """Writes the model at `path`, in whatever format, as a checkpoint folder; returns the source.

    `assumed` are n_head and block_size for the format that does not store them. AdamW's moments
    come along where the file holds them.
    """
    source = open_source(path, **assumed)
    if tokenizer is None:
        tokenizer, notes = _own_tokenizer(source)
        source.notes += notes
    elif tokenizer.vocab_size > source.config.vocab_size:
        raise UsageError(
            f"the {tokenizer.kind} tokenizer has {tokenizer.vocab_size:,} tokens, and "
            f"{source.path} a vocabulary of {source.config.vocab_size:,}; choose another"
        )
    step = source.optimizer_step
    trainer = None if step is None else {"step": step, "imported_from": source.format}
    save(out, source, tokenizer=tokenizer, trainer=trainer)
    return source


def open_source(path: str | Path, **assumed: int) -> ModelFile:
    """The model at `path`. UsageError where something is assumed that the file says itself."""
    if not assumed:
        return open_checkpoint(path)
    kind = detect(Path(path)) if is_foreign(Path(path)) else "hf"
    if kind != "heimerl":
        raise UsageError(f"{path} ({kind}) says itself how many heads and positions it has")
    return open_model(Path(path), **assumed)


def _own_tokenizer(source: ModelFile) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """A model's tokenizer; where there is none, a note that says so."""
    try:
        return source.tokenizer(), ()
    except GptcError as error:
        return None, (f"without a tokenizer: {error}",)
