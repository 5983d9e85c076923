"""The datasets that are known by name: their addresses and licences."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from gptc.errors import GptcError
from gptc.files.download import ProgressCallback, download, get_json
from gptc.files.paths import cache_folder


@dataclass(frozen=True)
class RemoteFile:
    """A file of a known dataset; size and checksum where the server tells them."""

    url: str
    n_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Known:
    """A dataset that is known by name: one file, or files of a repository of the Hugging Face hub.

    `files` are patterns of paths in the repository, in whose order they are read; `validation` is
    the pattern of those that the dataset itself sets apart to validate on, if it does.
    """

    licence: str
    file: RemoteFile | None = None
    repository: str = ""
    revision: str = "main"
    folder: str = ""
    files: tuple[str, ...] = ()
    validation: str | None = None


_STORIES_LICENCE = "MIT, as gptc itself"
_KNOWN = {
    "shakespeare": Known(
        "public domain",
        RemoteFile(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
            "input.txt",
            1_115_394,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
    ),
    "tinystories": Known(
        "CDLA-Sharing-1.0",
        repository="roneneldan/TinyStories",
        files=(r"TinyStoriesV2-GPT4-train\.txt", r"TinyStoriesV2-GPT4-valid\.txt"),
        validation=r"TinyStoriesV2-GPT4-valid\.txt",
    ),
    "openwebtext": Known(
        "CC0-1.0",
        repository="Skylion007/openwebtext",
        revision="refs/convert/parquet",
        folder="plain_text/train",
        files=(r".*\.parquet",),
    ),
    "fineweb-10b": Known(
        "ODC-By-1.0",
        repository="HuggingFaceFW/fineweb",
        folder="sample/10BT",
        files=(r".*\.parquet",),
    ),
    "fineweb-edu-10b": Known(
        "ODC-By-1.0",
        repository="HuggingFaceFW/fineweb-edu",
        folder="sample/10BT",
        files=(r".*\.parquet",),
    ),
}
STORIES = ("stories", "stories-wide")  # written here: see stories.py
KNOWN_DATASETS = (*STORIES, *_KNOWN)


def licence(name: str) -> str | None:
    """The licence of a known dataset, None for any other source."""
    known = _KNOWN.get(name)
    return _STORIES_LICENCE if name in STORIES else known.licence if known else None


def validates(source: str, file: str | None = None) -> bool:
    """Whether the file (None: any file) of a source is what its dataset sets apart to validate."""
    known = _KNOWN.get(source)
    if known is None or known.validation is None:
        return False
    return file is None or re.fullmatch(known.validation, file) is not None


def remote_files(name: str) -> list[RemoteFile]:
    """The files of a dataset that is not written here. GptcError when its list cannot be had."""
    known = _KNOWN[name]
    if known.file is not None:
        return [known.file]
    # The variable by which users of the hub's own client name a mirror.
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision = quote(known.revision, safe="")
    page: str | None = (
        f"{hub}/api/datasets/{known.repository}/tree/{revision}/{known.folder}".rstrip("/")
    )
    entries = []
    while page:
        listed, page = get_json(page)
        entries += [entry for entry in listed if entry.get("type") == "file"]
    files = []
    for pattern in known.files:
        for entry in sorted(entries, key=lambda entry: str(entry["path"])):
            if re.fullmatch(pattern, entry["path"].rpartition("/")[2]):
                where = f"{known.repository}/resolve/{revision}/{quote(entry['path'])}"
                files.append(
                    RemoteFile(
                        f"{hub}/datasets/{where}",
                        entry.get("size"),
                        (entry.get("lfs") or {}).get("oid"),
                    )
                )
    if not files:
        raise GptcError(
            f"{hub} lists no files of {name} ({known.repository}): it may have moved; give the "
            "addresses of its files as sources instead"
        )
    return files


def fetch(name: str, progress: ProgressCallback, notify: Callable[[str], None]) -> list[Path]:
    """The files of a known dataset, from the cache or else downloaded into it."""
    folder = cache_folder() / "downloads" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = remote_files(name)
    sizes = [file.n_bytes for file in files if file.n_bytes is not None]
    notify(
        f"{name}: licence {_KNOWN[name].licence}, {sum(sizes):,} bytes in {len(files)} "
        f"file{'' if len(files) == 1 else 's'}"
    )
    paths = []
    for file in files:
        path = folder / file.url.rpartition("/")[2]
        notify(f"  {path.name}: SHA-256 {file.sha256 or 'not published'}")
        there = path.is_file() and file.n_bytes in (None, path.stat().st_size)
        if not there:
            download(file.url, path, sha256=file.sha256, n_bytes=file.n_bytes, progress=progress)
        paths.append(path)
    return paths
