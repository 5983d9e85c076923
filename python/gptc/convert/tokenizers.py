"""Whether the tokenizer of an export is the one that was given."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gptc.convert.import_model import WITHOUT_TOKENIZER, open_assuming
from gptc.errors import GptcError, UnknownTokenizer
from gptc.tokenizer import folder
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.probe import check_tokens


def tokenizer_problem(given: Tokenizer, path: Path, notes: list[str]) -> str | None:
    """Why a program would not have the tokenizer `given` from the file at `path`; None if it would.

    The tokenizer is read back. Ends of a text that the format has no place for become a note, and
    so do those that its programs know by name.
    """
    if any(note.startswith(WITHOUT_TOKENIZER) for note in notes):
        return None  # the format has no place for it
    try:
        read_back = _read_back(path)
    except GptcError:
        return "read back, it is another one"
    for theirs in read_back:
        try:
            check_tokens(given, theirs, "read back, it")
        except GptcError as error:
            return str(error)
        ours, found = set(given.named_ends), set(theirs.named_ends)
        if found - ours:
            notes.append(f"texts will end with {_names(theirs, found - ours)} too, by that name")
        if ours - found:
            notes.append(f"without the end of text {_names(given, ours - found)}: no place for it")
    return None


def _read_back(path: Path) -> list[Tokenizer]:
    """The tokenizers of an export: ours, and that of Hugging Face's files."""
    found = [open_assuming(path).tokenizer()]
    theirs = None
    with suppress(UnknownTokenizer):  # of characters: only AutoTokenizer reads such a file
        theirs = folder.read_files(path) if path.is_dir() else None
    return [*found, theirs] if theirs is not None else found


def _names(tokenizer: Tokenizer, ids: set[int]) -> str:
    return ", ".join(tokenizer.decode([id]) for id in sorted(ids))
