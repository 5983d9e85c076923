"""One preparation of a dataset of conversations: rows to sequences of tokens with masks.

Rows are read and encoded once, into a temporary file. Then whole rows are drawn to validate, and
the shards of both splits are written.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from gptc._version import __version__
from gptc.data.chats import COLUMNS, KINDS, Chat, Kind, recognised
from gptc.data.description import (
    CHATS_VERSION,
    DATASET_FILE,
    description_of,
    most_shards,
    too_many_shards,
)
from gptc.data.job import WORK_FOLDER, install, occupied
from gptc.data.json_array import is_json
from gptc.data.kinds import REJECTED
from gptc.data.objects import LEAVE_OUT, Row, objects
from gptc.data.options import PrepareOptions
from gptc.data.readers import Reading, suffixes
from gptc.data.rows import Tally
from gptc.data.shards import ShardFile
from gptc.data.sources import Gathering, SourceFile, gather, identity, is_remote, is_url, url_file
from gptc.data.splits import drawn_documents
from gptc.errors import GptcError, UsageError
from gptc.files.checksum import Checksum, file_checksum, recorded_checksum
from gptc.files.download import ProgressCallback
from gptc.files.whole import remove
from gptc.files.words import plural
from gptc.tokenizer.absent import Absent
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.chat import choose_template
from gptc.tokenizer.conversations import SAID, Encoded, encode_conversations, with_template
from gptc.tokenizer.folder import read_template

_MOST_BAD = 1000  # rows before the first good one
_BATCH_ROWS = 256  # rendered by one process
_BATCH_BYTES = 4 << 20
_FORMATS = [(s,) for s in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".zip", ".tar")]


def first_row(file: SourceFile, reading: Reading) -> tuple[str, dict[str, Any]] | None:
    """The place and the fields of the first good row of a file or archive; None without any."""
    with suppress(GptcError):  # the reader of texts names the fault
        return require_row(file, reading)
    return None


def require_row(file: SourceFile, reading: Reading) -> tuple[str, dict[str, Any]] | None:
    """As `first_row`; GptcError if all rows are bad, and None for a file that is not of rows."""
    if reading.raw or not has_rows(file.name):
        return None
    fault = None
    rows = objects(file.path, file.name, reading, (*COLUMNS, reading.text_field), Tally())
    for where, row in islice(rows, _MOST_BAD):
        if not isinstance(row, GptcError):
            return where, row
        fault = fault or row
    if fault is not None:  # of all rows: there is none to keep
        raise GptcError(str(fault).replace(f", {LEAVE_OUT}", ""))
    return None


def has_rows(name: str) -> bool:
    """Whether a file of that name is one of rows, or an archive, which may hold some."""
    return suffixes(name)[:1] in _FORMATS or is_json(name)


def layout_of(file: SourceFile, reading: Reading) -> Kind | None:
    """The layout of the rows of a file or archive; None if it has no conversations."""
    found = first_row(file, reading)
    if found is None or reading.text_field in found[1]:
        return None
    return recognised(found[1])


def has_chats(sources: Sequence[str], how: Gathering, reading: Reading) -> bool:
    """Whether the first local source with files of rows has conversations."""
    for source in sources:
        if not is_remote(source) and source != "-" and (Path(source).exists() or "*" in source):
            path = Path(source)
            if path.exists() and not path.is_file() and not path.is_dir():
                continue  # a pipe can be read only once
            for file in gather(source, how):
                found = layout_of(file, reading)
                if found is not None or suffixes(file.name)[:1] in _FORMATS:
                    return found is not None
    return False


@dataclass
class _Spool:
    """Sequences in two temporary files, and the sizes of rows."""

    tokens: IO[bytes]
    kinds: IO[bytes]
    sizes: list[int]  # tokens of each row
    contents: list[bytes]  # a hash of each row
    n_sequences: int = 0

    def add(self, sequences: Sequence[Encoded]) -> None:
        """Appends a row."""
        digest = hashlib.blake2b(digest_size=16)
        for sequence in sequences:
            digest.update(len(sequence.tokens).to_bytes(8, "little"))
            digest.update(sequence.tokens.astype("<i4").tobytes())
            digest.update(sequence.kinds.tobytes())
            self.tokens.write(sequence.tokens.astype("<i4").data)
            self.kinds.write(sequence.kinds.data)
        self.sizes.append(sum(len(sequence.tokens) for sequence in sequences))
        self.contents.append(digest.digest())
        self.n_sequences += len(sequences)


class ChatJob:
    """One preparation, in the folder where it grows. The interface is that of job.Job."""

    def __init__(
        self,
        out: Path,
        sources: Sequence[str],
        how: PrepareOptions,
        tokenizer: Tokenizer,
        force: bool,
        report: ProgressCallback,
    ) -> None:
        if how.val_tokens is not None:
            raise UsageError(
                "--val-tokens would cut a conversation: give --val-fraction, which takes whole rows"
            )
        self.out, self.work = out, out / WORK_FOLDER
        self.sources, self.force, self.report = sources, force, report
        tokenizer = copy.copy(tokenizer)  # it gets a template
        self._how, self._tokenizer = how, tokenizer
        self._own = "given" if how.chat_template else "the model's"
        if how.chat_template is not None and how.chat_template not in tokenizer.marks.templates:
            marks = replace(tokenizer.marks, chat_template=read_template(Path(how.chat_template)))
            tokenizer.marks = marks
        elif how.chat_template is not None:
            chosen = choose_template(tokenizer, how.chat_template)
            tokenizer.marks = replace(tokenizer.marks, chat_template=chosen)
        elif with_template(tokenizer):
            self._own = "ChatML"
        self._template = choose_template(tokenizer, None)
        digest = hashlib.sha256("\0".join(tokenizer.marks.templates.values()).encode()).hexdigest()
        self.options: dict[str, Any] = {
            "tokenizer": tokenizer.fingerprint(),
            "chat_template": digest,
            "val_fraction": how.val_fraction,
            "val_by": how.val_by or "random",
            "seed": how.seed,
            "shard_tokens": how.shard_tokens,
            "include": list(how.include),
            "exclude": list(how.exclude),
            "on_bad_row": how.on_bad_row,
        }
        self._kind: Kind | None = None
        self._left_out: list[GptcError] = []
        self._absent = Absent(tokenizer)

    def run(self, how: Gathering, reading: Reading, there: dict[str, Any] | None) -> bool:
        """Prepares. True when the dataset `there` is the same already."""
        shutil.rmtree(self.work, ignore_errors=True)
        how.spool.mkdir(parents=True)
        built = self.work / "dataset"
        built.mkdir()
        gathered = [gather(source, how) for source in self.sources]
        found = [self._described(*both) for both in zip(self.sources, gathered, strict=True)]
        if there:
            old = [(source["bytes"], recorded_checksum(source)) for source in there["sources"]]
            if old != [(source["bytes"], source["checksum"]) for source in found]:
                raise occupied(self.out)
            return True
        with (how.spool / "tokens").open("wb") as tokens, (how.spool / "kinds").open("wb") as kinds:
            spool = _Spool(tokens, kinds, [], [])
            for source, files in zip(found, gathered, strict=True):
                self._encode(source, files, reading, spool)
        if self._left_out:
            more = f", such as {self._left_out[0]}".removesuffix(_ADVICE)
            more = more.removesuffix(f", {LEAVE_OUT}")
            how.notify(f"note: {plural(len(self._left_out), 'bad row')} left out{more}")
        if note := self._absent.note():
            how.notify(note)
        if not spool.sizes:
            raise GptcError(f"{', '.join(self.sources)} has no conversation: name a file with some")
        for source, files in zip(found, gathered, strict=True):
            if self._described(source["source"], files)["checksum"] != source["checksum"]:
                raise GptcError(f"{source['source']} changed while it was read: prepare again")
        if repeated := len(spool.contents) - len(set(spool.contents)):
            how.notify(
                f"note: {plural(repeated, 'row')} of {len(spool.contents):,} repeat others; equal "
                "rows are all trained on or all held out"
            )
        held_out = self._held_out(spool.contents)
        self._check_shards(found, spool, held_out)
        splits = {
            "train": self._write(built, "train", how.spool, spool.sizes, ~held_out),
            "val": self._write(built, "val", how.spool, spool.sizes, held_out),
        }
        self._tokenizer.save(built)
        install(built, self.out, self._meta(found, splits, spool.n_sequences))
        return False

    def _meta(
        self, found: list[dict[str, Any]], splits: dict[str, Any], n_sequences: int
    ) -> dict[str, Any]:
        assert self._kind is not None
        chosen = self._tokenizer
        return {
            "version": CHATS_VERSION,
            "sources": found,
            "tokenizer": {"kind": chosen.kind, "fingerprint": chosen.fingerprint()},
            "vocab_size": chosen.vocab_size,
            "splits": splits,
            "chats": {
                "layout": self._kind.name,
                "template": self._own,
                "left_out": len(self._left_out),
                "sequences": n_sequences,
            },
            "options": self.options,
            "created_by": f"gptc {__version__}",
        }

    def _check_shards(
        self, found: list[dict[str, Any]], spool: _Spool, held_out: npt.NDArray[np.bool_]
    ) -> None:
        """GptcError, before shards are written, for more than dataset.json has room for."""
        there = self.out / DATASET_FILE
        rest = description_of(self._meta(found, {}, spool.n_sequences), there)
        most = self._how.shard_tokens
        n = sum(len(_groups(spool.sizes, chosen, most)) for chosen in (held_out, ~held_out))
        if n > most_shards(len(rest), masks=True):
            raise too_many_shards(there)

    def clean(self) -> None:
        """Removes the work folder, and downloads that were used."""
        shutil.rmtree(self.work, ignore_errors=True)
        for source in filter(is_url, self.sources):
            remove(url_file(source))

    def _described(self, source: str, files: Sequence[SourceFile]) -> dict[str, Any]:
        """The entry of a source in dataset.json."""
        if len(files) == 1:
            checksum = file_checksum(files[0].path)
        else:
            several = Checksum()
            for file in files:
                several.update(file_checksum(file.path).encode())
            checksum = several.value()
        n_bytes = sum(file.path.stat().st_size for file in files)
        return {**identity(source), "bytes": n_bytes, "checksum": checksum}

    # ---- rows to sequences ----

    def _encode(
        self, source: dict[str, Any], files: Sequence[SourceFile], reading: Reading, spool: _Spool
    ) -> None:
        """Appends the rows of a source to the spool."""
        tally, n_before = Tally(), len(spool.sizes)
        n_bytes, n_done = source["bytes"], 0
        for file in files:
            batch: list[tuple[str, list[Chat]]] = []
            n_batch = 0
            rows = objects(file.path, file.name, reading, COLUMNS, tally)
            for where, chats in self._chats(rows):
                batch.append((where, chats))
                n_batch += sum(len(str(chat.messages)) * len(chat.messages) for chat in chats)
                if len(batch) >= _BATCH_ROWS or n_batch > _BATCH_BYTES:
                    self._encode_batch(batch, spool)
                    n_batch = 0
            self._encode_batch(batch, spool)
            n_done += file.path.stat().st_size
            self.report("encoding", n_done, n_bytes)
        source["files"] = tally.n_files
        source["documents"] = len(spool.sizes) - n_before

    def _chats(self, rows: Iterator[Row]) -> Iterator[tuple[str, list[Chat]]]:
        """The place and the conversations of each row that is good."""
        for where, row in rows:
            try:
                if isinstance(row, GptcError):
                    raise row
                self._kind = self._kind or recognised(row)
                if self._kind is None:
                    raise unknown_layout(where, row)
                chats = self._kind.chats(row, where)
                if "tool_calls" not in self._template and any(map(_has_calls, chats)):
                    raise GptcError(
                        f"{where} calls a tool, and the chat template has no place for calls: give "
                        "another one with --chat-template FILE, or leave such rows out with "
                        "--on-bad-row skip"
                    )
                yield where, chats
            except GptcError as error:
                self._refuse(error)

    def _refuse(self, error: GptcError) -> None:
        if self._how.on_bad_row == "stop":
            raise error
        self._left_out.append(error)

    def _encode_batch(self, batch: list[tuple[str, list[Chat]]], spool: _Spool) -> None:
        """Appends these rows, and empties the list."""
        values = [
            {"messages": chat.messages, **({"tools": chat.tools} if chat.tools else {})}
            for _, chats in batch
            for chat in chats
        ]
        if not values:
            return
        for message in (message for value in values for message in value["messages"]):
            self._absent.see(str(message.get("content")).encode("utf-8", "surrogatepass"))
        encoded = iter(encode_conversations(self._tokenizer, values, self._template))
        for where, chats in batch:
            try:
                spool.add(_row([next(encoded) for _ in chats]))
            except GptcError as error:
                self._refuse(GptcError(f"{where}: {error}{_ADVICE}"))
        batch.clear()

    # ---- splits ----

    def _held_out(self, contents: list[bytes]) -> npt.NDArray[np.bool_]:
        """The rows that validate: whole ones, at least one of several unless none is asked for.

        None of them is equal to one that trains.
        """
        fraction = self._how.val_fraction or 0
        n = min(len(contents) - 1, max(1, round(len(contents) * fraction))) if fraction else 0
        number: dict[bytes, int] = {}
        which = np.array([number.setdefault(row, len(number)) for row in contents])
        if self._how.val_by == "order":
            return ~np.isin(which, which[: len(contents) - n])
        counts = np.bincount(which)
        drawn = drawn_documents(counts, n, self._how.seed)
        if n and len(counts) > 1 and not drawn.any():  # each is repeated too often
            drawn[np.argmin(counts)] = True
        held_out: npt.NDArray[np.bool_] = drawn[which]
        return held_out

    def _write(
        self, folder: Path, split: str, spool: Path, sizes: list[int], chosen: npt.NDArray[np.bool_]
    ) -> dict[str, Any]:
        """Writes the shards of a split; returns its entry in dataset.json."""
        vocab_size, most = self._tokenizer.vocab_size, self._how.shard_tokens
        shards: list[dict[str, Any]] = []
        n_bytes = n_said = 0
        groups = _groups(sizes, chosen, most)
        with (spool / "tokens").open("rb") as all_tokens, (spool / "kinds").open("rb") as all_kinds:
            for i, rows in enumerate(groups):
                path = folder / f"{split}_{i:06}.bin"
                file = ShardFile(path, vocab_size, sum(n for _, n in rows))
                mask, checksum = path.with_suffix(".mask"), Checksum()
                try:
                    with mask.open("wb") as masks:
                        for begin, n in rows:
                            all_tokens.seek(4 * begin)
                            all_kinds.seek(begin)
                            tokens = np.frombuffer(all_tokens.read(4 * n), "<i4")
                            kinds = all_kinds.read(n)
                            file.append(tokens)
                            masks.write(kinds)
                            checksum.update(kinds)
                            n_bytes += self._tokenizer.count_bytes(tokens)
                            n_said += int(np.count_nonzero(np.frombuffer(kinds, np.uint8) & SAID))
                    recorded = {"file": mask.name, "checksum": checksum.value()}
                    shards.append(
                        {
                            "file": path.name,
                            "tokens": file.n_tokens,
                            "checksum": file.close(),
                            "mask": recorded,
                        }
                    )
                finally:
                    file.abandon()
        n_tokens = sum(shard["tokens"] for shard in shards)
        counted = {"tokens": n_tokens, "bytes": n_bytes, "rows": int(chosen.sum()), "said": n_said}
        return {**counted, "shards": shards}


def _groups(
    sizes: list[int], chosen: npt.NDArray[np.bool_], most: int
) -> list[list[tuple[int, int]]]:
    """The begins and sizes of the chosen rows, shard by shard; a row is not cut."""
    groups: list[list[tuple[int, int]]] = []
    begin, room = 0, 0
    for i, n in enumerate(sizes):
        if chosen[i]:
            if not groups or n > room:
                groups.append([])
                room = most
            groups[-1].append((begin, n))
            room -= n
        begin += n
    return groups


_ADVICE = ": repair it, or leave such rows out with --on-bad-row skip"


def _has_calls(chat: Chat) -> bool:
    return any(message.get("tool_calls") for message in chat.messages)


def _row(found: list[list[Encoded] | GptcError]) -> list[Encoded]:
    """The sequences of a row: all of a conversation, or the last of the chosen and the rejected."""
    sequences: list[Encoded] = []
    for one in found:
        if isinstance(one, GptcError):
            raise one
        sequences += one if len(found) == 1 else one[-1:]
    if len(found) > 1:
        sequences[1].kinds[0] |= REJECTED
    return sequences


def unknown_layout(where: str, row: dict[str, Any]) -> GptcError:
    known = ", or ".join(" and ".join(kind.needs) for kind in (*KINDS[1:], KINDS[0]))
    names = ", ".join(map(str, row)) or "none"
    cut = " (separated by ; and not by commas?)" if ";" in names and len(row) == 1 else ""
    return GptcError(
        f"{where} has the fields {names:.100}, which no layout has{cut}: name them {known}"
    )
