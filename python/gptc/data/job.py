"""One preparation of a dataset, in the folder where it grows until it is finished."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gptc._version import __version__
from gptc.data.crew import Crew
from gptc.data.description import (
    DATASET_FILE,
    DATASET_VERSION,
    SPLITS,
    description_of,
    most_shards,
    too_many_shards,
)
from gptc.data.encode import Piece, SplitWriter, count_tokens, encode_text, move_tail
from gptc.data.journal import has_lines, intact, line_of, read_lines
from gptc.data.known import licence, validates
from gptc.data.options import Errors
from gptc.data.readers import Reading, check_utf8
from gptc.data.rows import Tally
from gptc.data.scan import Scan, scan_text
from gptc.data.sources import Gathering, SourceFile, Text, gather, identity, is_url, url_file
from gptc.data.splits import DividedText, Division, at_end, held_out, val_begin
from gptc.data.stories import SEPARATOR
from gptc.errors import GptcError
from gptc.files.checksum import recorded_checksum
from gptc.files.download import ProgressCallback
from gptc.files.limits import read_file
from gptc.files.whole import remove, sync_folder, write_file
from gptc.files.words import plural
from gptc.tokenizer.base import END_OF_TEXT, FILE_NAME, Tokenizer
from gptc.tokenizer.native import ByteTokenizer, CharTokenizer
from gptc.tokenizer.registry import bpe_size, make_tokenizer, read_tokenizer

WORK_FOLDER = ".partial"
_LARGE_BYTES = 16 << 20  # many blocks


def source_notes(source: Mapping[str, Any]) -> list[str]:
    """What gave no text, of a source in dataset.json."""
    notes = [] if source["bytes"] else [f"note: the source {source['source']} is empty"]
    if n := source.get("rows_without_text"):
        notes.append(f"note: {source['source']}: {plural(n, 'row')} without text left out")
    return notes


class Job:
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
        crew: Crew | None = None,
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
        self._crew = crew
        self._plan = self.work / "plan.json"
        self._journal = self.work / "journal.jsonl"
        self.finished = False

    def run(self, how: Gathering, reading: Reading, there: dict[str, Any] | None) -> bool:
        """Prepares. True when the dataset `there` is the same already."""
        # After this is freed, the C library keeps the memory of blocks for the next ones. To ask
        # the kernel for each would take as long as all the work on the bytes.
        np.empty(_LARGE_BYTES, dtype=np.uint8)
        numbered = self._gathered(how)
        n_train = len(numbered)  # files before those that are set apart
        if self.options["val_fraction"] is None:
            apart = [p for p in numbered if validates(self.sources[p[0]], p[1].path.name)]
            numbered = [p for p in numbered if p not in apart] + apart
            n_train -= len(apart)
        reading, between = self._marks(reading)
        text = Text([file for _, file in numbered], reading, self.errors, between)
        source_of = [i for i, _ in numbered]
        recorded = [(s["bytes"], recorded_checksum(s)) for s in there["sources"]] if there else []
        algorithm = recorded[0][1].partition(":")[0] if recorded else "xxh3_128"
        scan = scan_text(
            text, source_of, self.given, self.tokenizer == "char", self.report, algorithm
        )
        found = self._described(scan, text, source_of)
        self._note(found, how)
        if note := scan.absent.note():
            how.notify(note)
        if there:
            if recorded != list(zip(scan.sizes, scan.checksums, strict=True)):
                raise occupied(self.out)
            return True
        self._resume_or_begin({"options": self.options, "sources": found}, how.notify)
        chosen = self._chosen(text, scan)
        division = self._divided(text, scan, text.begin(n_train), chosen)
        meta = {
            "version": DATASET_VERSION,
            "sources": found,
            "tokenizer": {"kind": chosen.kind, "fingerprint": chosen.fingerprint()},
            "vocab_size": chosen.vocab_size,
            "splits": {},
            "options": self.options,
            "created_by": f"gptc {__version__}",
        }
        most = most_shards(len(description_of(meta, self.out / DATASET_FILE)))
        splits = self._encode(DividedText(text, division), chosen, most, how.notify)
        if division.n_held_out is not None:
            splits["val"]["documents"] = division.n_held_out  # drawn at random
        text.check_unchanged()
        meta["splits"] = splits
        install(self.work / "dataset", self.out, meta)
        self.finished = True
        return False

    def _gathered(self, how: Gathering) -> list[tuple[int, SourceFile]]:
        """The files of all sources, each with the index of its source."""
        shutil.rmtree(how.spool, ignore_errors=True)
        how.spool.mkdir(parents=True)
        numbered = []
        for i, source in enumerate(self.sources):
            numbered += [(i, file) for file in gather(source, how)]
        return numbered

    def _described(self, scan: Scan, text: Text, source_of: Sequence[int]) -> list[dict[str, Any]]:
        """The entries of the sources in dataset.json."""
        found: list[dict[str, Any]] = []
        tallies = [Tally() for _ in self.sources]
        for i, tally in zip(source_of, text.tallies, strict=True):
            tallies[i].n_files += tally.n_files
            tallies[i].n_without_text += tally.n_without_text
        for i, source in enumerate(self.sources):
            record = {"bytes": scan.sizes[i], "checksum": scan.checksums[i]}
            found.append({**identity(source), **record})
            found[i]["files"] = tallies[i].n_files
            found[i]["documents"] = scan.documents[i]
            if tallies[i].n_without_text:
                found[i]["rows_without_text"] = tallies[i].n_without_text
            if terms := licence(source):
                found[i]["licence"] = terms
        return found

    def _note(self, found: Sequence[dict[str, Any]], how: Gathering) -> None:
        """Tells what gave no text. GptcError when nothing did."""
        for source in found:
            if not any(other["bytes"] for other in found):
                why = " that --include and --exclude leave" if how.choice else ""
                raise GptcError(f"the source {source['source']} is empty: name one with text{why}")
            for note in source_notes(source):
                how.notify(note)

    def clean(self) -> None:
        """Removes the work folder, unless it has finished shards of an unfinished dataset."""
        if self.finished or not has_lines(self._journal):
            shutil.rmtree(self.work, ignore_errors=True)
        if self.finished:
            for source in filter(is_url, self.sources):
                remove(url_file(source))

    def _marks(self, reading: Reading) -> tuple[Reading, bytes]:
        """The marks between rows and between files."""
        given = self.given
        mark = END_OF_TEXT.encode()
        if bpe_size(self.tokenizer) is not None or (given and given.end_of_text is not None):
            return replace(reading, before_row=mark), mark
        # As plain characters, in the way of the text named stories.
        return replace(reading, after_row=SEPARATOR.encode()), b""

    def _resume_or_begin(self, plan: dict[str, Any], notify: Callable[[str], None]) -> None:
        """Keeps the finished shards of the same preparation. GptcError when they are another's."""
        description_of(plan, self.out / DATASET_FILE, "name folders or a glob instead of each file")
        old = self._old_plan(notify)
        if old != plan:
            if old is not None and has_lines(self._journal) and not self.force:
                raise GptcError(
                    f"{self.out} holds an unfinished dataset made of other sources or with other "
                    "options: choose another --out, or discard it with --force"
                )
            for path in (self._plan, self._journal):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.work / "dataset", ignore_errors=True)
            write_file(self._plan, json.dumps(plan).encode())
        (self.work / "dataset").mkdir(exist_ok=True)

    def _old_plan(self, notify: Callable[[str], None]) -> Any:
        """The plan of an interrupted preparation; None without one, and for a damaged one."""
        try:
            return json.loads(read_file(self._plan, "json"))
        except FileNotFoundError:
            return None
        except OSError as error:
            why = f"cannot read {self._plan}: {error.strerror}"
        except GptcError as error:
            why = str(error)
        except (ValueError, RecursionError):
            why = f"{self._plan} is damaged"
        notify(f"note: {why}; the preparation begins again")
        return None

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

    def _divided(self, text: Text, scan: Scan, begin: int, tokenizer: Tokenizer) -> Division:
        """The documents that train and those that validate; `begin`: of files set apart."""
        fraction, by = self.options["val_fraction"], self.options["val_by"]
        if self.options["val_tokens"] is not None or fraction is None:
            return at_end(text, begin)
        if by != "order" and fraction:
            if division := held_out(text, scan, fraction, self.options["seed"]):
                return division
            if by == "random":
                raise GptcError(
                    f"{plural(sum(scan.documents), 'document')} cannot give a part of {fraction:g} "
                    "to validate on without a cut: choose --val-by order, or give more documents"
                )
        return at_end(text, val_begin(text, scan, fraction, isinstance(tokenizer, ByteTokenizer)))

    def _encode(
        self, text: DividedText, tokenizer: Tokenizer, most: int, notify: Callable[[str], None]
    ) -> dict[str, Any]:
        """Writes the shards of both splits; returns their entries in dataset.json.

        GptcError for more than `most` shards.
        """
        options, n_each = self.options, self.options["shard_tokens"]
        folder = self.work / "dataset"
        done = intact(folder, read_lines(self._journal, notify), tokenizer)
        wanted = {line["file"] for line in done}
        for path in folder.glob("*.bin"):
            if path.name not in wanted:
                path.unlink()
        write_file(self._journal, b"".join(line_of(line).encode() for line in done))
        ranges = {"train": (0, text.n_train), "val": (text.n_train, text.n_bytes)}
        splits: dict[str, dict[str, Any]] = {}
        if isinstance(tokenizer, ByteTokenizer) and text.n_bytes // n_each > most:
            self._refuse_shards()
        room = iter(range(most - len(done)))

        def log(line: str) -> None:
            if next(room, None) is None:
                self._refuse_shards()
            journal.write(line)

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
                    n_each,
                    before,
                    log,
                    end - at - skip if isinstance(tokenizer, ByteTokenizer) else None,
                )
                try:
                    for piece in self._pieces(text, tokenizer, at, end, pool, at > begin):
                        writer.append(piece, skip)
                        skip = 0
                        journal.flush()
                        self.report("encoding", piece.end, text.n_bytes)
                    shards = writer.finish(end)
                    splits[split] = {"bytes": writer.n_bytes, "shards": shards}
                    journal.flush()
                finally:
                    writer.abandon()
        n_all = sum(count_tokens(splits[split]) for split in SPLITS)
        n_val = (
            count_tokens(splits["val"]) if options["val_tokens"] is None else options["val_tokens"]
        )
        if n_val >= n_all:
            remove(self._journal)  # the same command would not do better
            raise GptcError(
                f"of {n_all} tokens none would be left to train on: prepare more text, or choose "
                "a smaller --val-tokens or --val-fraction"
            )
        if options["val_tokens"] is not None:
            splits = move_tail(folder, splits["train"], options, tokenizer)
        return {split: {"tokens": count_tokens(splits[split]), **splits[split]} for split in SPLITS}

    def _pieces(
        self,
        text: DividedText,
        tokenizer: Tokenizer,
        begin: int,
        end: int,
        pool: ThreadPoolExecutor,
        continued: bool,
    ) -> Iterator[Piece]:
        """The tokens of bytes of the text, by this process or by all ranks."""
        what = text, tokenizer, self.errors, begin, end
        if self._crew is None or isinstance(tokenizer, ByteTokenizer):
            return encode_text(*what, self.jobs, pool, continued)
        return self._crew.encode(*what, pool, continued)

    def _refuse_shards(self) -> NoReturn:
        remove(self._journal)  # the same command would not do better
        raise too_many_shards(self.out / DATASET_FILE)


def occupied(out: Path) -> GptcError:
    return GptcError(
        f"{out} already holds a dataset made of other sources or with other options: choose "
        "another --out, or replace it with --force"
    )


def _start(tokenizer: Tokenizer, marked: bool) -> str:
    """The start of a document in a text whose end-of-text marks, if any, are plain characters."""
    start = f"{END_OF_TEXT}\n" if marked else "\n"
    if tokenizer.end_of_text is not None and marked:
        return tokenizer.start_text()
    if isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.characters:
        return END_OF_TEXT if marked else tokenizer.characters[0]
    return start


def install(built: Path, out: Path, meta: dict[str, Any]) -> None:
    """Moves a finished dataset to its place; dataset.json leaves first and arrives last."""
    there = out / DATASET_FILE
    description = description_of(meta, there)
    if os.path.lexists(there) and not _holds(there, description):
        # If it is the same, another process was faster and may use the files.
        there.unlink()
    os.sync()  # every shard, in one go: there may be very many
    for path in built.iterdir():
        path.replace(out / path.name)
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    wanted = {file["file"] for shard in shards for file in (shard, shard.get("mask", shard))}
    for path in out.iterdir():
        if re.fullmatch(r"(train|val)_\d{6}\.(bin|mask)", path.name) and path.name not in wanted:
            path.unlink()
    sync_folder(out)
    write_file(there, description)
    sync_folder(out)


def _holds(path: Path, content: bytes) -> bool:
    """Whether a regular file has that content."""
    try:
        return read_file(path, "json") == content
    except (OSError, GptcError):
        return False
