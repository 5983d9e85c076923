"""Models into the formats of other programs.

    export_model(open_checkpoint("stories"), "gguf", "stories.gguf", dtype="q8_0")

An export is read back under a temporary name, and must compute the same as the model that was
given, or hold its rows rounded. Then its files get their names, so each appears whole or not at
all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path

import numpy as np

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.writer import save
from gptc.convert.import_model import open_assuming, tokenizer_or_note
from gptc.convert.tokenizers import tokenizer_problem
from gptc.errors import GptcError, NoTokenizer, UsageError
from gptc.files.whole import empty, move, restore, scratch_folder, write_file
from gptc.files.words import quoted
from gptc.formats import hf
from gptc.formats.format import Export, Format, Output, fixed_tokens
from gptc.formats.gguf_types import PACKED
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import WRITERS
from gptc.tokenizer.base import Tokenizer

DTYPES = {hf.NAME: tuple(hf.CODECS)} | {name: known.dtypes for name, known in WRITERS.items()}
"""The number formats of each format that gptc writes; the first is the default."""
_PROMPT_TOKENS = 16


@dataclass
class ExportReport:
    """The files of an export, and how far its logits are from those of the model given."""

    path: Path
    format: str
    dtype: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    largest_difference: float = 0.0  # of logits
    relative_difference: float = 0.0  # norm of the differences over norm of the logits


def export_model(
    model: ModelFile,
    to: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    version: int | None = None,
    debug_state: bool = False,
    replace: bool = False,
    weights_only: bool = False,
) -> ExportReport:
    """Writes a model in the format `to`, reads it back and compares the logits of both.

    `version` is that of llama2.c (0: the one that its `run` reads), `debug_state` adds the file of
    llm.c's own test. GptcError when the format cannot hold the model, or when the model's tokenizer
    cannot be read; `weights_only` leaves it out.
    """
    if to not in DTYPES:
        raise UsageError(f"no format {to!r}; known: {', '.join(DTYPES)}")
    dtype = dtype or default_dtype(model, to)
    if dtype not in DTYPES[to]:
        raise UsageError(f"{to} holds {', '.join(DTYPES[to])}, not {dtype}")
    if dtype == PACKED and not model.packing():
        raise UsageError(f"{model.path} has no quantized matrices: choose another --dtype")
    if model.lora is not None:
        raise UsageError(f"{model.path} holds adapters: add --merge to write them into their base")
    writer = WRITERS.get(to)
    options = writer.options if writer else ()
    if version is not None and "version" not in options:
        raise UsageError(f"{to} is written in one version: leave out --file-version")
    if debug_state and "debug_state" not in options:
        raise UsageError(f"{to} has no debug state: leave out --debug-state")
    path = Path(out)
    restore(path)
    if path.exists() and not replace:
        raise UsageError(f"{path} exists already; choose another name, or replace it with --force")
    tokenizer, notes = (None, ()) if weights_only else _tokenizer(model)
    report = ExportReport(path, to, dtype, [path], list(notes))
    load = partial(load_model, model)
    request = Export(model, path, dtype, tokenizer, load, version, debug_state, report.notes)
    with _work_folder(path) as work:
        # Checked before anything has its final name: a failure leaves what was there before.
        request = replaced(request, path=work / path.name)
        report.files = _write_draft(request, writer, None if replace else path)
        problem = tokenizer and tokenizer_problem(tokenizer, request.path, report.notes)
        if problem:
            empty(work)
            report.notes.append(f"without a tokenizer: {problem}")
            request = replaced(request, tokenizer=None)
            report.files = _write_draft(request, writer, None if replace else path)
        report.files = [path.with_name(file.name) for file in report.files]
        _compare(model, request.path, report)
        old = _old_tokenizer(report, request, writer, replace)
        for final in report.files:
            with _explained(final):
                move(work / final.name, final)
        if old is not None:
            with _explained(old):
                old.unlink()
            report.notes.append(f"removed {old}, the tokenizer of an earlier model")
    return report


def default_dtype(model: ModelFile, to: str) -> str:
    """The dtype of an export that names none: a quantized model keeps its blocks where it can."""
    keeps = PACKED in DTYPES[to] and model.packing()
    return PACKED if keeps else DTYPES[to][0]


def _tokenizer(model: ModelFile) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """A model's tokenizer; None, with a note, where it has none that fits."""
    try:
        model.tokenizer()
    except NoTokenizer:
        pass
    except GptcError as error:
        raise GptcError(f"{error}; or export the weights alone with --weights-only") from None
    return tokenizer_or_note(model)


def _write_draft(request: Export, writer: Format | None, kept: Path | None) -> list[Path]:
    """Writes the files of an export; returns their paths. Files next to `kept` are not replaced."""
    if not writer or not writer.write:  # a checkpoint folder, with the checksums of its files
        codec = hf.CODECS[request.dtype]
        save(
            request.path,
            request.model,
            tokenizer=request.tokenizer,
            codec=codec,
            notes=request.notes,
        )
        return [request.path]
    files = writer.write(request)
    if kept is not None:
        _keep_others(kept, files[1:])
    for file in files:
        _write(file)
    return [file.path for file in files]


def _old_tokenizer(
    report: ExportReport, request: Export, writer: Format | None, replace: bool
) -> Path | None:
    """The tokenizer of an earlier model of that name, which programs would read with this one.

    None where there is none. UsageError without `replace`, which allows to remove it.
    """
    if not writer or "tokenizer" not in writer.companions:
        return None
    old = replaced(request, path=report.path).companion("tokenizer")
    if old in report.files or not old.exists():
        return None
    if not replace:
        raise UsageError(
            f"{old} exists already, and this model has no tokenizer; choose another name than "
            f"{report.path.stem} for the model, or remove that file with --force"
        )
    return old


@contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path`. GptcError when it cannot be made."""
    with ExitStack() as stack:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch_folder(path))
        yield folder


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """GptcError instead of an OSError."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GptcError(f"cannot write {path}: {reason}") from None


def _keep_others(path: Path, companions: Iterable[Output]) -> None:
    """UsageError when a file next to the model exists already, with another content.

    They are named by the model's stem, which a.bin and a.old share.
    """
    for draft, chunks in companions:
        file = path.with_name(draft.name)
        same = isinstance(chunks, list) and file.is_file() and file.read_bytes() == b"".join(chunks)
        if file.exists() and not same:
            raise UsageError(
                f"{file} exists already, with another content; choose another name than "
                f"{path.stem} for the model, or replace it with --force"
            )


def _write(file: Output) -> None:
    """Writes a file that appears whole or not at all. GptcError when the disk does not take it."""
    with _explained(file.path):
        write_file(file.path, file.chunks)


def _compare(model: ModelFile, draft: Path, report: ExportReport) -> None:
    """Reads the file back. GptcError when it is not the same model."""
    writer = WRITERS.get(report.format)
    assumed = {name: getattr(model.config, name) for name in (writer.assumes if writer else ())}
    n = min(_PROMPT_TOKENS, model.config.block_size)
    prompt = fixed_tokens(model.config.vocab_size, n)[None]
    back = open_assuming(draft, **assumed)
    if report.dtype != "fp32":
        _compare_rows(model, back, report)
    logits = []
    kept = report.dtype == PACKED  # a model that would not fit into memory as float32 fits so
    how = {"dtype": "packed", "device": "cpu"} if kept else {"dtype": "fp32"}
    for side in (model, back):
        with load_model(side, **how, max_batch=1, max_seq=n) as loaded:
            logits.append(loaded.logits(prompt).astype(np.float64))
    ours, theirs = logits
    for name, values in ((model.path, ours), (report.path, theirs)):
        if not np.isfinite(values).all():
            raise GptcError(
                f"the logits of {name} are not finite; look for the cause with: "
                f"gptc verify {quoted(model.path)}"
            )
    report.prompt_tokens = n
    report.largest_difference = float(np.abs(theirs - ours).max())
    report.relative_difference = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    if (kept or report.dtype == "fp32") and report.largest_difference:
        raise GptcError(
            f"{report.path} was not written: read back, its logits differ by "
            f"{report.largest_difference:g}; this is an error of gptc, please report it"
        )


def _compare_rows(model: ModelFile, back: ModelFile, report: ExportReport) -> None:
    """GptcError when a row of a matrix is not the rounded one that was given.

    Rounding to 4 bits moves a row by less than half of its norm, the wrong row by more than that.
    """
    for name, _, _ in model.config.parameters():
        given, read = (np.atleast_2d(side.read(name)) for side in (model, back))
        norms, off = np.linalg.norm(given, axis=1), np.linalg.norm(read - given, axis=1)
        # Formats whose scales are shared among rows may lose a row that is far smaller than others.
        most = 0.5 * norms + 0.25 * np.sqrt(np.mean(np.square(norms)))
        wrong = off > most
        if wrong.any():
            row = int(np.argmax(wrong))
            raise GptcError(
                f"{report.path} was not written: read back, row {row:,} of {name} is "
                f"{off[row] / norms[row]:.0%} off; numbers of such different sizes need a finer "
                "--dtype, such as fp32"
            )
