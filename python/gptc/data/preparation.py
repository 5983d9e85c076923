"""Text to a dataset on disk: deterministic, in bounded memory, and restartable.

    dataset = prepare(["book.txt"], Path("data/book"), tokenizer="gpt2")

The text is read twice. The first reading finds out what decides about the rest (sizes, checksums,
where documents begin, which characters occur), the second one encodes. Until the dataset is
finished it grows in `OUT/.partial`, with a journal of the finished shards: the same command goes on
after the last of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gptc._version import __version__
from gptc.data import stories
from gptc.data.dataset import DATASET_FILE, DATASET_VERSION, SPLITS, Dataset, read_meta
from gptc.data.encode import SplitWriter, count_tokens, encode_text, intact, move_tail
from gptc.data.known import KNOWN_DATASETS, STORIES, licence, validates
from gptc.data.readers import Errors, Reading, check_utf8
from gptc.data.scan import Scan, scan_text, val_begin
from gptc.data.shards import MAX_SHARD_TOKENS
from gptc.data.sources import Gathering, Text, gather, is_remote, is_url, url_file
from gptc.data.stories import SEPARATOR
from gptc.errors import GptcError, UsageError
from gptc.files.checksum import file_checksum, recorded_checksum
from gptc.files.download import ProgressCallback
from gptc.files.paths import cache_folder
from gptc.files.whole import write_file
from gptc.tokenizer.base import END_OF_TEXT, FILE_NAME, Tokenizer
from gptc.tokenizer.native import ByteTokenizer, CharTokenizer
from gptc.tokenizer.registry import bpe_size, is_spec, make_tokenizer, read_tokenizer

SHARD_TOKENS = 100_000_000
STORIES_BYTES = 5_000_000
VAL_FRACTION = 0.1

WORK_FOLDER = ".partial"
_LARGE_BYTES = 16 << 20  # many blocks


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    val_fraction: float | None = None,
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    jobs: int | None = None,
    force: bool = False,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_field: str = "text",
    errors: Errors = "strict",
    raw: bool = False,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Turns text into a dataset at `out`, which appears complete or not at all.

    `sources` are files, folders (every file below, sorted, that the globs `include` and `exclude`
    leave), globs, "-" (standard input), URLs, or names in KNOWN_DATASETS; they are joined in order.
    `tokenizer` is as in `make_tokenizer`. Files are unpacked, and rows give their `text_field`, as
    `readers` describes, unless `raw`. `errors` says what becomes of bytes that are no UTF-8 where
    the tokenizer needs text: refused, replaced, or kept as tokens of single bytes.

    Documents are files, rows, and what <|endoftext|> separates. The end of the text becomes the
    validation split: the last `val_tokens` tokens, else the last documents that make up
    `val_fraction` of the bytes, else (one document, or few and long ones) that fraction of the
    bytes (with the bytes tokenizer) or characters. Without either, the files that known datasets
    set apart to validate go to the end and are the split; where there are none, `val_fraction` is
    VAL_FRACTION. `stories_bytes` and `seed` choose the text of "stories". `jobs` threads encode
    (None: one a core); the result does not depend on their number.

    Where `out` already holds just this dataset it is returned as it is, with `already_there` set;
    where an earlier call was cut off, this one goes on. UsageError for options out of range;
    GptcError for sources that are missing, empty, damaged or no UTF-8, and for an `out` that holds
    anything else, without `force`.
    """
    out = Path(out)
    jobs = jobs if jobs is not None else len(os.sched_getaffinity(0))
    if val_fraction is None and (val_tokens is not None or not any(map(validates, sources))):
        val_fraction = VAL_FRACTION
    _check_options(sources, val_fraction, val_tokens, shard_tokens, jobs, stories_bytes)
    # A tokenizer that learns from the text is made when the text has been read once.
    learns = tokenizer == "char" or bpe_size(tokenizer) is not None
    given = None if learns else make_tokenizer(tokenizer)
    if given is not None:
        given.bos = None  # a model's own; the documents of a dataset do not begin with it
    if errors == "bytes" and (tokenizer == "char" or (given and given.byte_ids is None)):
        raise UsageError(
            f"the tokenizer {tokenizer} has no tokens for single bytes: choose --errors replace, "
            "or another --tokenizer"
        )
    options: dict[str, Any] = {
        "tokenizer": given.fingerprint() if given and not is_spec(tokenizer) else tokenizer,
        "val_fraction": val_fraction,
        "val_tokens": val_tokens,
        "shard_tokens": shard_tokens,
        "include": list(include),
        "exclude": list(exclude),
        "text_field": text_field,
        "errors": errors,
        "raw": raw,
    }
    if any(source in STORIES for source in sources):
        options["stories"] = _stories_options(stories_bytes, seed)

    existed = out.exists()
    work = out / WORK_FOLDER
    try:
        there = None if force else _dataset_at(out)
        if there and there["options"] != options:
            raise _occupied(out)
        remote = all(is_remote(source) for source in sources)
        if there and remote and [source["source"] for source in there["sources"]] == list(sources):
            return _already_there(out)  # without downloading it again to compare
        with _locked(out):
            job = _Job(
                out,
                sources,
                options,
                tokenizer,
                given,
                errors,
                jobs,
                force,
                progress or (lambda action, n_done, n_bytes: None),
            )
            how = Gathering(
                out,
                work / "spool",
                include,
                exclude,
                (stories_bytes, seed),
                job.report,
                notify or (lambda line: None),
            )
            reading = Reading(text_field, raw)
            try:
                same = job.run(how, reading, there)
            finally:
                job.clean()
        if same:
            return _already_there(out)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        kept = "; the same command goes on after the finished shards" if work.exists() else ""
        raise GptcError(
            f"cannot prepare {out}: {where}{e.strerror or e}; check the path, its permissions and "
            f"the free space{kept}"
        ) from e
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return Dataset.open(out)


class _Job:
    """One preparation, in the folder where it grows."""

    def __init__(
        self,
        out: Path,
        sources: Sequence[str],
        options: dict[str, Any],
        tokenizer: str,
        given: Tokenizer | None,
        errors: Errors,
        jobs: int,
        force: bool,
        report: ProgressCallback,
    ) -> None:
        self.out = out
        self.work = out / WORK_FOLDER
        self.sources = sources
        self.options = options
        self.tokenizer = tokenizer
        self.given = given
        self.errors: Errors = "bytes" if isinstance(given, ByteTokenizer) else errors
        self.jobs = jobs
        self.force = force
        self.report = report
        self._plan = self.work / "plan.json"
        self._journal = self.work / "journal.jsonl"
        self.finished = False

    def run(self, how: Gathering, reading: Reading, there: dict[str, Any] | None) -> bool:
        """Prepares. True when the dataset `there` turned out to be the one that is wanted."""
        # Having seen this freed, the C library keeps the memory of blocks for those that follow.
        # It would ask the kernel for each, which takes as long as all that is done to the bytes.
        np.empty(_LARGE_BYTES, dtype=np.uint8)
        shutil.rmtree(how.spool, ignore_errors=True)
        how.spool.mkdir(parents=True)
        gathered = []
        for source in self.sources:
            parts = gather(source, how)
            if not sum(part.n_bytes for part in parts):
                raise _empty(source)
            gathered.append(parts)
        numbered = [(i, part) for i, parts in enumerate(gathered) for part in parts]
        n_train = len(numbered)  # parts before those that are set apart
        if self.options["val_fraction"] is None:
            apart = [p for p in numbered if validates(self.sources[p[0]], p[1].path.name)]
            numbered = [p for p in numbered if p not in apart] + apart
            n_train -= len(apart)
        reading, between = self._marks(reading)
        text = Text([part for _, part in numbered], reading, self.errors, between)
        source_of = [i for i, _ in numbered]
        recorded = [(s["bytes"], recorded_checksum(s)) for s in there["sources"]] if there else []
        algorithm = recorded[0][1].partition(":")[0] if recorded else "xxh3_128"
        scan = scan_text(
            text, source_of, self.given, self.tokenizer == "char", self.report, algorithm
        )
        found = []
        for source, n_bytes, checksum in zip(self.sources, scan.sizes, scan.checksums, strict=True):
            if not n_bytes:
                raise _empty(source)
            found.append({"source": source, "bytes": n_bytes, "checksum": checksum})
            if terms := licence(source):
                found[-1]["licence"] = terms
        if there:
            if recorded != list(zip(scan.sizes, scan.checksums, strict=True)):
                raise _occupied(self.out)
            return True
        self._go_on_or_begin({"options": self.options, "sources": found})
        chosen = self._chosen(text, scan)
        begin = text.begin(n_train)
        if self.options["val_tokens"] is None and self.options["val_fraction"] is not None:
            begin = val_begin(
                text, scan, self.options["val_fraction"], isinstance(chosen, ByteTokenizer)
            )
        splits = self._encode(text, chosen, begin)
        text.check_unchanged()
        meta = {
            "version": DATASET_VERSION,
            "sources": found,
            "tokenizer": {"kind": chosen.kind, "fingerprint": chosen.fingerprint()},
            "vocab_size": chosen.vocab_size,
            "splits": splits,
            "options": self.options,
            "created_by": f"gptc {__version__}",
        }
        _install(self.work / "dataset", self.out, meta)
        self.finished = True
        return False

    def clean(self) -> None:
        """Removes what is of no more use: everything, unless finished shards wait for the rest."""
        if self.finished or not self._journal_lines():
            shutil.rmtree(self.work, ignore_errors=True)
        if self.finished:
            for source in filter(is_url, self.sources):
                url_file(source).unlink(missing_ok=True)

    def _marks(self, reading: Reading) -> tuple[Reading, bytes]:
        """How rows and files are told apart in the text."""
        given = self.given
        mark = END_OF_TEXT.encode()
        if bpe_size(self.tokenizer) is not None or (given and given.end_of_text is not None):
            return Reading(reading.text_field, reading.raw, before_row=mark), mark
        # As plain characters, in the way of the text named stories.
        return Reading(reading.text_field, reading.raw, after_row=SEPARATOR.encode()), b""

    def _go_on_or_begin(self, plan: dict[str, Any]) -> None:
        """Keeps what an unfinished preparation of the same has done. GptcError for another's."""
        try:
            old = json.loads(self._plan.read_bytes())
        except (OSError, ValueError):
            old = None
        if old != plan:
            if old is not None and self._journal_lines() and not self.force:
                raise GptcError(
                    f"{self.out} holds an unfinished dataset made of other sources or with other "
                    "options: choose another --out, or discard it with --force"
                )
            for path in (self._plan, self._journal):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.work / "dataset", ignore_errors=True)
            write_file(self._plan, json.dumps(plan).encode())
        (self.work / "dataset").mkdir(exist_ok=True)

    def _chosen(self, text: Text, scan: Scan) -> Tokenizer:
        """The tokenizer, which is stored with the shards."""
        folder = self.work / "dataset"
        if (folder / FILE_NAME).is_file():
            return read_tokenizer(folder)
        chosen = self.given
        if chosen is None and self.tokenizer == "char":
            chosen = CharTokenizer(scan.characters)
        elif chosen is None:
            self.report("training the tokenizer", 0, None)
            characters = check_utf8(text.read(0, text.n_bytes), text.where, "replace")
            chosen = make_tokenizer(self.tokenizer, characters)
        if self.tokenizer in ("bytes", "char") or bpe_size(self.tokenizer) is not None:
            chosen.start = _start(chosen, scan.marked)
        chosen.save(folder)
        return chosen

    def _journal_lines(self) -> list[dict[str, Any]]:
        """The lines of the journal; one that was cut off and all after it are left out."""
        lines = []
        try:
            for line in self._journal.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    lines.append(json.loads(line))
        except (OSError, ValueError):
            pass
        return lines

    def _encode(self, text: Text, tokenizer: Tokenizer, val_begin: int) -> dict[str, Any]:
        """Writes the shards of both splits; returns what dataset.json says about them."""
        options = self.options
        folder = self.work / "dataset"
        done = intact(folder, self._journal_lines(), tokenizer)
        wanted = {line["file"] for line in done}
        for path in folder.glob("*.bin"):
            if path.name not in wanted:
                path.unlink()
        write_file(self._journal, b"".join(json.dumps(line).encode() + b"\n" for line in done))
        ranges = {"train": (0, val_begin), "val": (val_begin, text.n_bytes)}
        splits: dict[str, dict[str, Any]] = {}
        with self._journal.open("a") as journal, ThreadPoolExecutor(self.jobs) as pool:
            for split, (begin, end) in ranges.items():
                before = [line for line in done if line["split"] == split]
                at, skip = begin, 0
                if before:
                    at, skip = before[-1]["at"], before[-1]["skip"]
                writer = SplitWriter(
                    folder,
                    split,
                    tokenizer,
                    options["shard_tokens"],
                    before,
                    journal.write,
                    end - at - skip if isinstance(tokenizer, ByteTokenizer) else None,
                )
                try:
                    for piece in encode_text(
                        text, tokenizer, self.errors, at, end, self.jobs, pool
                    ):
                        writer.append(piece, skip)
                        skip = 0
                        journal.flush()
                        self.report("encoding", piece.end, text.n_bytes)
                    splits[split] = {"bytes": end - begin, "shards": writer.finish(end)}
                    journal.flush()
                finally:
                    writer.abandon()
        n_all = sum(count_tokens(splits[split]) for split in SPLITS)
        n_val = (
            count_tokens(splits["val"]) if options["val_tokens"] is None else options["val_tokens"]
        )
        if n_val >= n_all:
            self._journal.unlink()  # the same command would not do better
            raise GptcError(
                f"of {n_all} tokens none would be left to train on: prepare more text, or choose "
                "a smaller --val-tokens or --val-fraction"
            )
        if options["val_tokens"] is not None:
            splits = move_tail(folder, splits["train"], options, tokenizer)
        return {split: {"tokens": count_tokens(splits[split]), **splits[split]} for split in SPLITS}


def resolve_dataset(
    name_or_path: str,
    tokenizer: str = "bytes",
    *,
    stories_bytes: int = STORIES_BYTES,
    seed: int = 0,
    jobs: int = 1,
    progress: ProgressCallback | None = None,
) -> Dataset:
    """The dataset of that name: a prepared folder, a name in KNOWN_DATASETS, or a file of text.

    The latter two are prepared with `tokenizer` into the user's cache at first use. A prepared
    folder keeps the tokenizer it has. GptcError when there is nothing of that name.
    """
    path = Path(name_or_path)
    if path.is_dir() and (name_or_path not in KNOWN_DATASETS or (path / DATASET_FILE).exists()):
        return Dataset.open(path)
    key: dict[str, Any] = {"version": DATASET_VERSION, "tokenizer": tokenizer}
    if validates(name_or_path):
        key["split"] = "its own"
    if name_or_path in STORIES:
        key["stories"] = _stories_options(stories_bytes, seed)
    elif name_or_path not in KNOWN_DATASETS:
        if not path.is_file():
            raise GptcError(
                f"no dataset {name_or_path!r}: name a folder made by gptc prepare, a text file, or "
                f"one of {', '.join(KNOWN_DATASETS)}"
            )
        try:
            key["checksum"] = file_checksum(path)
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
    val_fraction: float | None,
    val_tokens: int | None,
    shard_tokens: int,
    jobs: int,
    stories_bytes: int,
) -> None:
    if not sources:
        raise UsageError(f"name a SOURCE: a file, a folder, a URL, {' or '.join(KNOWN_DATASETS)}")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be at least 0 and less than 1")
    if val_tokens is not None and val_tokens < 0:
        raise UsageError(f"--val-tokens {val_tokens} must be at least 0")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UsageError(f"--shard-tokens {shard_tokens} must be from 1 to {MAX_SHARD_TOKENS}")
    if jobs < 1 or stories_bytes < 1:
        raise UsageError("--jobs and --stories-bytes must be at least 1")


def _stories_options(n_bytes: int, seed: int) -> dict[str, Any]:
    """What determines the text of "stories": its size, its seed, and what it is drawn from."""
    digest = hashlib.sha256()
    for path in [Path(stories.__file__), *stories.grammar_files()]:
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


def _empty(source: str) -> GptcError:
    return GptcError(f"the source {source} is empty: name one that holds text")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the folder `out`, which is made where it is missing, against other processes."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if out.exists() and os.path.samestat(os.fstat(descriptor), out.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def _install(built: Path, out: Path, meta: dict[str, Any]) -> None:
    """Moves a finished dataset to its place; dataset.json leaves first and arrives last."""
    description = (json.dumps(meta, indent=2) + "\n").encode()
    there = out / DATASET_FILE
    if there.exists() and there.read_bytes() != description:
        # Where it is the same, another process was faster, and may be in use of the files.
        there.unlink()
    os.sync()  # every shard, in one go: there may be very many
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
