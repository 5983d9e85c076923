"""Text to a dataset on disk.

dataset = prepare(["book.txt"], Path("data/book"), tokenizer="gpt2")
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc import __version__
from gptc.dataset import DATASET_FILE, DATASET_VERSION, SPLITS, Dataset, file_sha256, read_meta
from gptc.errors import GptcError, UsageError
from gptc.shards import MAX_SHARD_TOKENS, ShardFile
from gptc.sources import BLOCK_BYTES, KNOWN_DATASETS, Part, Text, gather, is_remote
from gptc.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Progress,
    Tokenizer,
    Tokens,
    Utf8Decoder,
    bpe_size,
    cache_folder,
    character_cut,
    is_spec,
    make_tokenizer,
    write_file,
)

SHARD_TOKENS = 100_000_000
STORIES_BYTES = 5_000_000

_LONGEST_RUN_BYTES = 64 << 20  # text without a place to cut that is still encoded in one piece


@dataclass
class _Scan:
    """What the first reading of a text finds out."""

    sha256: list[str] = field(default_factory=list)  # of each source
    marked: bool = False  # END_OF_TEXT occurs
    borders: array[int] = field(default_factory=lambda: array("q"))  # bytes where documents begin
    characters: list[str] = field(default_factory=list)  # that occur, for a new char tokenizer
    n_characters: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (first byte, characters before)


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    val_fraction: float = 0.1,
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    jobs: int = 1,
    force: bool = False,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Turns text into a dataset at `out`, which appears complete or not at all.

    `sources` are files, folders (every file below, sorted), globs, "-" (standard input), URLs, or
    names in KNOWN_DATASETS; they are joined in order, with nothing in between. `tokenizer` is as in
    `make_tokenizer`. The end of the text becomes the validation split: the last `val_tokens`
    tokens, else the last `val_fraction` of its documents where it marks them with <|endoftext|>,
    else that fraction of its bytes (with the bytes tokenizer) or characters. `stories_bytes` and
    `seed` choose the text of "stories". `jobs` threads encode.

    Where `out` already holds just this dataset it is returned as it is, with `already_there` set.
    UsageError for options out of range; GptcError for sources that are missing, empty or no UTF-8
    (unless the tokenizer is "bytes"), and for an `out` that holds anything else, without `force`.
    """
    out = Path(out)
    report = progress or (lambda action, n_done, n_bytes: None)
    _check_options(sources, val_fraction, val_tokens, shard_tokens, jobs, stories_bytes)
    # A tokenizer that learns from the text is made when the text has been read once.
    learns = tokenizer == "char" or bpe_size(tokenizer) is not None
    given = None if learns else make_tokenizer(tokenizer)
    options: dict[str, Any] = {
        "tokenizer": given.fingerprint() if given and not is_spec(tokenizer) else tokenizer,
        "val_fraction": val_fraction,
        "val_tokens": val_tokens,
        "shard_tokens": shard_tokens,
    }
    if "stories" in sources:
        options["stories"] = _stories_options(stories_bytes, seed)

    created = not out.exists()
    work = out / f".{secrets.token_hex(4)}.partial"
    try:
        there = None if force else _dataset_at(out)
        if there and there["options"] != options:
            raise _occupied(out)
        remote = all(is_remote(source) for source in sources)
        if there and remote and [source["source"] for source in there["sources"]] == list(sources):
            return _already_there(out)  # without downloading it again to compare

        (work / "sources").mkdir(parents=True)
        (work / "dataset").mkdir()
        gathered = []
        for source in sources:
            parts = gather(source, out, work / "sources", (stories_bytes, seed), report)
            if not sum(part.n_bytes for part in parts):
                raise GptcError(f"the source {source} is empty: name one that holds text")
            gathered.append(parts)
        text = Text([part for parts in gathered for part in parts])
        scan = _scan(text, gathered, given, report)
        found = [
            {"source": source, "bytes": sum(part.n_bytes for part in parts), "sha256": sha256}
            for source, parts, sha256 in zip(sources, gathered, scan.sha256, strict=True)
        ]
        if there:
            same = [(s["bytes"], s["sha256"]) for s in there["sources"]]
            if same != [(s["bytes"], s["sha256"]) for s in found]:
                raise _occupied(out)
            return _already_there(out)
        if given is None and tokenizer != "char":
            report("training the tokenizer", 0, None)
            given = make_tokenizer(tokenizer, text.read(0, text.n_bytes))
        chosen = given or CharTokenizer(scan.characters)
        if is_spec(tokenizer) and tokenizer != "gpt2":
            chosen.start = _start(chosen, scan.marked)
        begin = text.n_bytes
        if val_tokens is None:
            begin = _val_begin(text, scan, val_fraction, by_byte=isinstance(chosen, ByteTokenizer))
        tokens = _split(text, partial(_encode, text, chosen, jobs), begin, val_tokens)
        splits = _write_splits(work / "dataset", tokens, text.n_bytes, chosen, shard_tokens, report)
        chosen.save(work / "dataset")
        meta = {
            "version": DATASET_VERSION,
            "sources": found,
            "tokenizer": {"kind": chosen.kind, "fingerprint": chosen.fingerprint()},
            "vocab_size": chosen.vocab_size,
            "splits": splits,
            "options": options,
            "created_by": f"gptc {__version__}",
        }
        _install(work / "dataset", out, meta)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise GptcError(
            f"cannot prepare {out}: {where}{e.strerror or e}; check the path, its permissions and "
            "the free space"
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if created and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return Dataset.open(out)


def resolve_dataset(
    name_or_path: str,
    tokenizer: str = "bytes",
    *,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Dataset:
    """The dataset of that name: a prepared folder, a name in KNOWN_DATASETS, or a file of text.

    The latter two are prepared with `tokenizer` into the user's cache at first use. A prepared
    folder keeps the tokenizer it has. GptcError when there is nothing of that name.
    """
    path = Path(name_or_path)
    if path.is_dir() and (name_or_path not in KNOWN_DATASETS or (path / DATASET_FILE).exists()):
        return Dataset.open(path)
    key: dict[str, Any] = {"version": DATASET_VERSION, "tokenizer": tokenizer}
    if name_or_path == "stories":
        key["stories"] = _stories_options(stories_bytes, seed)
    elif name_or_path not in KNOWN_DATASETS:
        if not path.is_file():
            raise GptcError(
                f"no dataset {name_or_path!r}: name a folder made by gptc prepare, a text file, or "
                f"one of {', '.join(KNOWN_DATASETS)}"
            )
        try:
            key["sha256"] = file_sha256(path)
        except OSError as e:
            raise GptcError(f"cannot read {path}: {e.strerror}") from None
    kind = tokenizer
    if is_spec(tokenizer):
        kind = tokenizer.split(":")[0]
    else:
        given = make_tokenizer(tokenizer)
        kind, key["tokenizer"] = given.kind, given.fingerprint()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w.-]", "_", path.stem)
    out = cache_folder() / "datasets" / f"{stem}-{kind}-{digest}"
    try:
        return Dataset.open(out)
    except GptcError:  # not there yet, or damaged: the cache is ours to repair
        return prepare(
            [name_or_path],
            out,
            tokenizer=tokenizer,
            force=out.exists(),
            jobs=jobs,
            stories_bytes=stories_bytes,
            seed=seed,
            progress=progress,
        )


def _check_options(
    sources: Sequence[str],
    val_fraction: float,
    val_tokens: int | None,
    shard_tokens: int,
    jobs: int,
    stories_bytes: int,
) -> None:
    if not sources:
        raise UsageError(f"name a SOURCE: a file, a folder, a URL, {' or '.join(KNOWN_DATASETS)}")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be at least 0 and less than 1")
    if val_tokens is not None and val_tokens < 0:
        raise UsageError(f"--val-tokens {val_tokens} must be at least 0")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UsageError(f"--shard-tokens {shard_tokens} must be from 1 to {MAX_SHARD_TOKENS}")
    if jobs < 1 or stories_bytes < 1:
        raise UsageError("--jobs and --stories-bytes must be at least 1")


def _stories_options(n_bytes: int, seed: int) -> dict[str, Any]:
    """What determines the text of "stories": its size, its seed, and what it is drawn from."""
    from gptc import stories

    module = Path(stories.__file__)
    folders = (module.parent / "data" / "stories", module.parents[2] / "data" / "stories")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    digest = hashlib.sha256()
    for path in [module, *sorted(folder.glob("*.txt"))]:
        digest.update(path.read_bytes())
    return {"bytes": n_bytes, "seed": seed, "grammar_sha256": digest.hexdigest()}


def _dataset_at(out: Path) -> dict[str, Any] | None:
    """The dataset.json at `out`, None where a dataset may be written."""
    if out.exists() and not out.is_dir():
        raise GptcError(f"{out} is a file: choose another --out")
    meta = read_meta(out)
    if meta is None and out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise GptcError(
            f"{out} holds other files: choose another --out, or write among them with --force"
        )
    return meta


def _occupied(out: Path) -> GptcError:
    return GptcError(
        f"{out} already holds a dataset made of other sources or with other options: choose "
        "another --out, or replace it with --force"
    )


def _already_there(out: Path) -> Dataset:
    dataset = Dataset.open(out)
    dataset.already_there = True
    return dataset


def _start(tokenizer: Tokenizer, marked: bool) -> str:
    """What begins a document in a text whose end-of-text marks, if any, are plain characters."""
    start = f"{END_OF_TEXT}\n" if marked else "\n"
    if tokenizer.end_of_text is not None and marked:
        return END_OF_TEXT
    if isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.characters:
        return END_OF_TEXT if marked else tokenizer.characters[0]
    return start


def _scan(
    text: Text, sources: Sequence[Sequence[Part]], given: Tokenizer | None, report: Progress
) -> _Scan:
    """Reads the text once. GptcError where the tokenizer (None: char, still to be made) refuses."""
    scan = _Scan()
    mark = END_OF_TEXT.encode()
    known = np.zeros(sys.maxunicode + 1, dtype=np.bool_)  # code points that occur
    decoder = Utf8Decoder(text.where)
    tail = b""  # of the block before: a mark may lie across the border
    n_done = 0
    for parts in sources:
        digest = hashlib.sha256()
        for block in text.read(n_done, n_done + sum(part.n_bytes for part in parts)):
            digest.update(block)
            window = tail + block
            first = n_done - len(tail)
            scan.borders.extend(first + m.start() for m in re.finditer(re.escape(mark), window))
            tail = window[-(len(mark) - 1) :]
            if not isinstance(given, ByteTokenizer):
                scan.blocks.append((n_done, scan.n_characters))
                scan.n_characters += int(np.count_nonzero(_begins_character(block)))
                begin = decoder.n_done
                characters = decoder.push(block)
                if given is None:
                    known[np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")] = True
                elif isinstance(given, CharTokenizer):
                    at = given.unknown(characters)
                    if at is not None:
                        where = text.where(begin + len(characters[:at].encode()))
                        raise GptcError(f"{where}: {given.refusal(characters[at])}")
            n_done += len(block)
            report("reading", n_done, text.n_bytes)
        scan.sha256.append(digest.hexdigest())
    decoder.finish()
    scan.characters = [chr(code) for code in np.flatnonzero(known)]
    scan.marked = len(scan.borders) > 0
    # A mark at the very beginning or end separates nothing.
    if scan.borders and scan.borders[0] == 0:
        scan.borders.pop(0)
    if scan.borders:
        rest = text.read(scan.borders[-1] + len(mark), text.n_bytes)
        if not any(block.strip() for block in rest):
            scan.borders.pop()
    return scan


def _begins_character(block: bytes) -> npt.NDArray[np.bool_]:
    """Which bytes of UTF-8 text are the first of a character."""
    begins: npt.NDArray[np.bool_] = np.frombuffer(block, dtype=np.uint8) & 0xC0 != 0x80
    return begins


def _val_begin(text: Text, scan: _Scan, val_fraction: float, by_byte: bool) -> int:
    """The byte at which the last `val_fraction` of the text begins."""
    if val_fraction == 0:
        return text.n_bytes
    if scan.borders:
        n_documents = len(scan.borders) + 1
        n_train = min(max(int(n_documents * (1 - val_fraction)), 1), n_documents - 1)
        return scan.borders[n_train - 1]
    if by_byte:
        return int(text.n_bytes * (1 - val_fraction))
    n_train = int(scan.n_characters * (1 - val_fraction))
    if n_train == scan.n_characters:
        return text.n_bytes
    first, n_before = scan.blocks[
        bisect_right(scan.blocks, n_train, key=lambda block: block[1]) - 1
    ]
    block = next(text.read(first, text.n_bytes))
    return first + int(np.flatnonzero(_begins_character(block))[n_train - n_before])


def _write_splits(
    folder: Path,
    tokens: Iterable[tuple[str, Tokens]],
    n_bytes: int,
    tokenizer: Tokenizer,
    shard_tokens: int,
    report: Progress,
) -> dict[str, Any]:
    """Writes the shards of both splits; returns what dataset.json says about them."""
    with ExitStack() as files:
        writers = {
            split: _SplitWriter(folder, split, tokenizer, shard_tokens, files) for split in SPLITS
        }
        n_done = 0
        for split, some in tokens:
            n_done += writers[split].append(some)
            report("encoding", n_done, n_bytes)
        if n_done != n_bytes:
            raise GptcError(
                f"the tokens stand for {n_done} bytes instead of {n_bytes}: did a source change "
                "meanwhile? Prepare again"
            )
        if not writers["train"].n_tokens:
            raise GptcError(
                f"of {writers['val'].n_tokens} tokens none would be left to train on: prepare more "
                "text, or choose a smaller --val-tokens or --val-fraction"
            )
        return {split: writer.finish() for split, writer in writers.items()}


class _SplitWriter:
    """Writes the shards of a split, `shard_tokens` in each but the last."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int, files: ExitStack
    ) -> None:
        """`files` closes, at its end, what an error has left open."""
        self._files = files
        self._prefix = folder / split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._shards: list[ShardFile] = []
        self.n_tokens = 0
        self.n_bytes = 0

    def append(self, tokens: Tokens) -> int:
        """Writes tokens; returns the number of bytes that they stand for."""
        n_bytes = self._tokenizer.count_bytes(tokens)
        self.n_tokens += len(tokens)
        self.n_bytes += n_bytes
        while len(tokens):
            if not self._shards or self._shards[-1].n_tokens == self._shard_tokens:
                self._next_shard()
            room = self._shard_tokens - self._shards[-1].n_tokens
            self._shards[-1].append(tokens[:room])
            tokens = tokens[room:]
        return n_bytes

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        path = Path(f"{self._prefix}_{len(self._shards):06d}.bin")
        shard = ShardFile(path, self._tokenizer.vocab_size)
        self._files.callback(shard.abandon)
        self._shards.append(shard)

    def finish(self) -> dict[str, Any]:
        """Completes the last shard; returns what dataset.json says about the split."""
        if self._shards:
            self._shards[-1].close()
        shards = [
            {"file": shard.path.name, "tokens": shard.n_tokens, "sha256": file_sha256(shard.path)}
            for shard in self._shards
        ]
        return {"tokens": self.n_tokens, "bytes": self.n_bytes, "shards": shards}


def _split(
    text: Text, encode: Callable[[int, int], Iterator[Tokens]], begin: int, val_tokens: int | None
) -> Iterator[tuple[str, Tokens]]:
    """The tokens of the text and their split, which is decided by byte `begin` or by count."""
    if val_tokens is None:
        yield from (("train", tokens) for tokens in encode(0, begin))
        yield from (("val", tokens) for tokens in encode(begin, text.n_bytes))
        return
    held: deque[Tokens] = deque()  # what could still be among the last val_tokens
    n_held = 0
    for tokens in encode(0, text.n_bytes):
        held.append(tokens)
        n_held += len(tokens)
        while held and n_held - len(held[0]) >= val_tokens:
            n_held -= len(held[0])
            yield "train", held.popleft()
    rest = np.concatenate([*held, np.zeros(0, dtype=np.int32)])
    n_train = max(0, len(rest) - val_tokens)
    yield "train", rest[:n_train]
    yield "val", rest[n_train:]


def _encode(text: Text, tokenizer: Tokenizer, jobs: int, begin: int, end: int) -> Iterator[Tokens]:
    """The tokens of the bytes [begin, end), in order, by `jobs` threads."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[Tokens]] = deque()
        for piece in _pieces(text.read(begin, end), tokenizer):
            waiting.append(pool.submit(tokenizer.encode_bytes, piece))
            if len(waiting) > jobs:  # bounds what is in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _pieces(blocks: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The same bytes, cut where the tokens on both sides do not depend on each other."""
    pending = bytearray()
    for block in blocks:
        pending += block
        if len(pending) < BLOCK_BYTES:
            continue
        cut = tokenizer.cut(pending)
        if not cut and len(pending) >= _LONGEST_RUN_BYTES:
            cut = character_cut(pending)  # rather a token border too many than no memory left
        if cut:
            yield bytes(pending[:cut])
            del pending[:cut]
    if pending:
        yield bytes(pending)


def _install(built: Path, out: Path, meta: dict[str, Any]) -> None:
    """Moves a finished dataset to its place; dataset.json leaves first and arrives last."""
    description = (json.dumps(meta, indent=2) + "\n").encode()
    there = out / DATASET_FILE
    if there.exists() and there.read_bytes() != description:
        # Where it is the same, another process was faster, and may be in use of the files.
        there.unlink()
    for path in built.iterdir():
        path.replace(out / path.name)
    wanted = {shard["file"] for split in meta["splits"].values() for shard in split["shards"]}
    for path in out.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6}\.bin", path.name) and path.name not in wanted:
            path.unlink()
    _sync_folder(out)
    write_file(there, description)
    _sync_folder(out)


def _sync_folder(folder: Path) -> None:
    """Flushes the names of the files in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
