"""Models into our checkpoints and out of them, and a close look at any file.

    import_model("stories15M.bin", "stories")
    export_model(open_checkpoint("stories"), "gguf", "stories.gguf", dtype="q8_0")
    verify("stories.gguf")

What is written appears whole or not at all. An export is read back and must compute what its source
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.writer import save
from gptc.convert.import_model import _own_tokenizer, open_source
from gptc.errors import GptcError, UsageError
from gptc.formats import gguf, heimerl, llama2c, llmc
from gptc.formats.binary import write_whole
from gptc.formats.model_file import ModelFile
from gptc.formats.numbers import BF16, F16, F32, Codec
from gptc.tokenizer import vocabulary
from gptc.tokenizer.base import Tokenizer

_HF: dict[str, Codec] = {"fp32": F32, "fp16": F16, "bf16": BF16}
DTYPES = {
    "hf": tuple(_HF),
    "gguf": tuple(gguf.CODECS),
    "llm.c": tuple(llmc.CODECS),
    "llama2.c": ("fp32", "int8"),
    "heimerl": ("fp32",),
}
"""What each format that we write can hold; the first is the default."""
_PROMPT_TOKENS = 16


@dataclass
class Report:
    """What an export wrote, and how far its logits are from the source's."""

    path: Path
    format: str
    dtype: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    largest_difference: float = 0.0  # of logits
    relative_difference: float = 0.0  # norm of the differences over norm of the logits


def export_model(
    source: ModelFile,
    to: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    version: int | None = None,
    debug_state: bool = False,
    replace: bool = False,
) -> Report:
    """Writes a model in the format `to`, reads it back and compares what both compute.

    `version` is that of llama2.c (0: what its `run` reads), `debug_state` adds llm.c's file for
    its own test. GptcError when the format cannot hold the model.
    """
    if to not in DTYPES:
        raise UsageError(f"no format {to!r}; known: {', '.join(DTYPES)}")
    dtype = dtype or DTYPES[to][0]
    if dtype not in DTYPES[to]:
        raise UsageError(f"{to} holds {', '.join(DTYPES[to])}, not {dtype}")
    if version is not None and to != "llama2.c":
        raise UsageError(f"{to} is written in one version: leave out --file-version")
    if debug_state and to != "llm.c":
        raise UsageError(f"{to} has no debug state: leave out --debug-state")
    if to == "llama2.c":
        version = (2 if dtype == "int8" else 0) if version is None else version
        if (version == 2) != (dtype == "int8"):
            raise UsageError(f"llama2.c's version {version} does not hold {dtype}")
    path = Path(out)
    if path.exists() and not replace:
        raise UsageError(f"{path} exists already; choose another name, or replace it with --force")
    tokenizer, notes = _own_tokenizer(source)
    report = Report(path, to, dtype, [path], list(notes))
    beside = _tokenizer_beside(source, to, tokenizer)
    if not replace:
        _keep_others(path, beside, debug_state)
    if to == "hf":
        save(path, source, tokenizer=tokenizer, replace=replace, codec=_HF[dtype])
    else:
        write_whole(path, _chunks(source, to, dtype, version, tokenizer, report))
        _write_companions(source, beside, debug_state, report)
    _compare(source, report)
    return report


def _chunks(
    source: ModelFile,
    to: str,
    dtype: str,
    version: int | None,
    tokenizer: Tokenizer | None,
    report: Report,
) -> Iterator[bytes | memoryview]:
    """The bytes of the model file."""
    if to == "llm.c":
        return llmc.model_chunks(source, dtype)
    if to == "llama2.c":
        if tokenizer is not None and tokenizer.bos != llama2c.BOS:
            report.notes.append(
                f"llama2.c's programs begin every text with token {llama2c.BOS}, which this model "
                "was not taught"
            )
        return llama2c.model_chunks(source, version or 0)
    if to == "heimerl":
        return heimerl.model_chunks(source)
    if tokenizer is not None:
        try:
            vocabulary.to_gguf(tokenizer, source.config.vocab_size)
        except GptcError as error:
            report.notes.append(f"without a tokenizer: {error}")
            tokenizer = None
    return gguf.model_chunks(source, tokenizer, dtype)


def _companion(path: Path, name: str) -> Path:
    """Where a program looks for the file of that name beside the model."""
    return path.with_name(f"{path.stem}_{name}.bin")


def _tokenizer_beside(source: ModelFile, to: str, tokenizer: Tokenizer | None) -> bytes | None:
    """The tokenizer file that goes with the model; None where there is none."""
    if tokenizer is not None and to == "llm.c":
        return b"".join(llmc.tokenizer_chunks(tokenizer))
    if tokenizer is not None and to == "llama2.c":
        return b"".join(llama2c.tokenizer_chunks(tokenizer, source.config.vocab_size))
    return None


def _keep_others(path: Path, tokenizer: bytes | None, debug_state: bool) -> None:
    """UsageError where a file beside the model is there already, and another model's.

    They are named by the model's stem: a.bin and a.old have the same.
    """
    taken = [_companion(path, "debug_state")] if debug_state else []
    beside = _companion(path, "tokenizer")
    if tokenizer is not None and not (beside.is_file() and beside.read_bytes() == tokenizer):
        taken.append(beside)
    for file in taken:
        if file.exists():
            raise UsageError(
                f"{file} exists already, with another content; choose another name than "
                f"{path.stem} for the model, or replace it with --force"
            )


def _write_companions(
    source: ModelFile, tokenizer: bytes | None, debug_state: bool, report: Report
) -> None:
    """The files that the programs want beside the model."""

    def write(name: str, chunks: Iterable[bytes | memoryview]) -> None:
        beside = _companion(report.path, name)
        write_whole(beside, chunks)
        report.files.append(beside)

    if tokenizer is not None:
        write("tokenizer", [tokenizer])
    if debug_state:
        B, T = 4, min(64, source.config.block_size)
        tokens = _prompt(source.config.vocab_size, B * T + 1)
        with load_model(source, training=True, max_batch=B, max_seq=T) as model:
            inputs, targets = tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T)
            write("debug_state", llmc.state_chunks(model, inputs, targets))


def _compare(source: ModelFile, report: Report) -> None:
    """Reads the file back. GptcError, and the file is gone, when it is not the same model."""
    assumed = {}
    if report.format == "heimerl":
        assumed = {"n_head": source.config.n_head, "block_size": source.config.block_size}
    n = min(_PROMPT_TOKENS, source.config.block_size)
    prompt = _prompt(source.config.vocab_size, n)[None]
    logits = []
    for side in (source, open_source(report.path, **assumed)):
        with load_model(side, dtype="fp32", max_batch=1, max_seq=n) as model:
            logits.append(model.logits(prompt).astype(np.float64))
    ours, theirs = logits
    report.prompt_tokens = n
    report.largest_difference = float(np.abs(theirs - ours).max())
    report.relative_difference = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    if report.dtype == "fp32" and np.isfinite(ours).all() and report.largest_difference:
        for file in report.files:
            if file.is_file():
                file.unlink()
        raise GptcError(
            f"{report.path} was removed: read back, its logits differ by "
            f"{report.largest_difference:g}; this is an error of gptc, please report it"
        )


def _prompt(vocab_size: int, n: int) -> npt.NDArray[np.int32]:
    """The same tokens each time, spread over the vocabulary."""
    return (np.arange(n, dtype=np.int64) * 7919 % vocab_size).astype(np.int32)


# ---- verify ----
