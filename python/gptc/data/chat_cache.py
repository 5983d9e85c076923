"""Files of conversations that are named instead of a dataset: prepared in the user's cache."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gptc.data.chat_job import has_rows, layout_of, require_row, unknown_layout
from gptc.data.chats import recognised
from gptc.data.dataset import Dataset
from gptc.data.description import CHATS_VERSION, read_meta
from gptc.data.json_array import array_objects
from gptc.data.known import KNOWN_DATASETS
from gptc.data.preparation import prepare
from gptc.data.readers import VERSION, Reading, suffixes
from gptc.data.sources import SourceFile
from gptc.errors import GptcError
from gptc.files.checksum import file_checksum
from gptc.files.download import ProgressCallback
from gptc.files.paths import cache_folder
from gptc.files.words import plural
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.folder import read_template

_SPLITS = 2  # of the rules that hold rows out
_BEGIN = 1 << 20  # bytes of a file of another name in which its first row is looked for
_LONGEST_STEM = 40  # characters of a file's name in that of its folder in the cache


def is_chat_file(name: str) -> bool:
    """Whether this is a file whose rows are conversations."""
    path = Path(name)
    try:
        return path.is_file() and layout_of(SourceFile.of(path), Reading()) is not None
    except OSError:
        return False


def is_texts(name: str) -> bool:
    """Whether data that is there, or is known by name, has texts and no conversations."""
    path = Path(name)
    if name in KNOWN_DATASETS or path.is_file():
        return not is_chat_file(name)
    with suppress(GptcError):
        return path.is_dir() and "chats" not in (read_meta(path) or {"chats": {}})
    return False


def check_rows(name: str) -> None:
    """GptcError for a file of rows that are neither conversations nor texts, or cannot be read.

    So is one whose name does not say that it has conversations.
    """
    path, reading = Path(name), Reading()
    if not path.is_file() or is_chat_file(name):
        return
    with suppress(OSError):
        if not has_rows(path.name):
            if suffix := _suffix_of_chats(path):
                raise GptcError(
                    f"{path} has rows of conversations, and its name does not say so: rename it to "
                    f"one that ends in {suffix}"
                )
            return
        found = require_row(SourceFile.of(path), reading)
        if found is None:
            raise GptcError(f"{path} has no rows: name a file with some")
        if reading.text_field not in found[1]:
            raise unknown_layout(*found)


def _suffix_of_chats(path: Path) -> str:
    """The suffix for a file of another name if its first row is of conversations, else ""."""
    with path.open("rb") as file:
        begin = file.read(_BEGIN)
    begin = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    first = begin.partition(b"\n")[0].decode("utf-8", "replace").strip()
    with suppress(ValueError, RecursionError):
        row = json.loads(first)
        if isinstance(row, dict) and recognised(row):
            return ".jsonl"
    if begin.startswith(b"["):
        with suppress(GptcError):
            for _, found in array_objects(io.BytesIO(begin), path.name):
                return ".json" if not isinstance(found, GptcError) and recognised(found) else ""
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        if recognised(name.strip('"') for name in first.split(separator)):
            return suffix
    return ""


def resolve_chats(
    name: str,
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    on_bad_row: str = "stop",
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """The dataset of a file of conversations, prepared with a model's tokenizer at first use."""
    path, templates = Path(name), tokenizer.marks.templates
    text = chat_template
    if chat_template is not None:
        named = templates.get(chat_template)
        text = read_template(Path(chat_template)) if named is None else named
    try:
        checksum = file_checksum(path)
    except OSError as e:
        raise GptcError(f"cannot read {path}: {e.strerror}") from None
    key = {
        "version": [CHATS_VERSION, VERSION, _SPLITS, *suffixes(path.name)],
        "checksum": checksum,
        "tokenizer": tokenizer.fingerprint(),
        "marks": tokenizer.marks.to_json(),
        "bos": tokenizer.bos,
        "template": text,
        "on_bad_row": on_bad_row,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w.-]", "_", path.stem)[:_LONGEST_STEM]
    out = cache_folder() / "datasets" / f"{stem}-chats-{digest}"
    try:
        found = Dataset.open(out)
    except GptcError:
        pass  # not there yet, or damaged: the cache is ours
    else:
        found.named = name
        if notify and (n := found.meta["chats"]["left_out"]):
            notify(f"note: {plural(n, 'bad row')} left out")
        return found
    found = prepare(
        [name],
        out,
        force=out.exists(),
        progress=progress,
        notify=notify,
        tokenizer_of_chats=tokenizer,
        chat_template=chat_template,
        on_bad_row=on_bad_row,
    )
    found.named = name
    return found
