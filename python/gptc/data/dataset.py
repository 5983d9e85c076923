"""A dataset on disk: a folder of shards, its tokenizer, and dataset.json, which describes them.

The shards are `train_000000.bin`, `val_000000.bin`, ...; dataset.json is written last: where it is,
the rest is whole.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from gptc.data.description import DATASET_FILE, DATASET_VERSION, SPLITS, read_meta
from gptc.data.kinds import is_target
from gptc.data.options import LongRows, TrainOn
from gptc.data.shards import HEADER_BYTES, OpenShard, Shard, open_shard, read_shard, shard_format
from gptc.errors import GptcError, UsageError
from gptc.files.checksum import Checksum, file_checksum, recorded_checksum
from gptc.files.download import ProgressCallback
from gptc.files.words import plural, quoted
from gptc.tokenizer.base import FILE_NAME, Tokenizer, Tokens
from gptc.tokenizer.conversations import FIRST, Kinds
from gptc.tokenizer.registry import read_tokenizer

ALL = "all"  # both splits, one after the other: the whole text


class Dataset:
    """A prepared dataset: its tokenizer and the shards of its splits, "train" and "val".

    Methods take "all" as a split too: the whole text.
    """

    folder: Path
    meta: dict[str, Any]
    """The content of dataset.json."""
    tokenizer: Tokenizer
    vocab_size: int
    already_there: bool
    """True when `prepare` found it as asked for, and wrote nothing."""
    train_on: TrainOn = "assistant"
    """The tokens of conversations that are targets."""
    long_rows: LongRows = "cut"
    """What becomes of conversations that are longer than a row of a batch."""
    document_end: int | None = None
    """The token between documents whose contexts are kept apart; None: they are not."""

    def __init__(self, folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.named = str(folder)
        """The name for messages: the folder's, or that of a file that is prepared in the cache."""
        self.meta = meta
        self.tokenizer = tokenizer
        self.vocab_size = int(meta["vocab_size"])
        self.already_there = False
        self._lock = Lock()
        self._open: dict[str, OpenShard] = {}  # by file name: those whose tokens were checked
        self._bytes: dict[str, int] = {}  # by split
        self._kinds: dict[str, Kinds] = {}  # by split
        self._shards: dict[str, list[dict[str, Any]]] = {
            split: meta["splits"][split]["shards"] for split in SPLITS
        }
        self._shards[ALL] = [shard for split in SPLITS for shard in self._shards[split]]
        self._records = {shard["file"]: shard for shard in self._shards[ALL]}
        self._begins = {
            split: [0, *accumulate(int(shard["tokens"]) for shard in shards)]
            for split, shards in self._shards.items()
        }

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Opens a folder that `gptc prepare` wrote.

        GptcError when the folder, its dataset.json or a shard is missing, or a size is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise GptcError(
                f"no dataset at {folder}: make one with gptc prepare SOURCE --out {quoted(folder)}"
            )
        meta = read_meta(folder)
        if meta is None:
            raise GptcError(
                f"{folder} holds no {DATASET_FILE}, so it is not a prepared dataset: make one of "
                f"its files with gptc prepare {quoted(folder)} --out DIR"
            )
        again = "copy the dataset again, or prepare it again with --force"
        try:
            tokenizer = read_tokenizer(folder)
            if tokenizer.fingerprint() != meta["tokenizer"]["fingerprint"]:
                raise GptcError(
                    f"{folder / FILE_NAME} is not the tokenizer that the dataset was made with: "
                    f"{again}"
                )
            if tokenizer.vocab_size != meta["vocab_size"]:
                raise ValueError
            dataset = cls(folder, meta, tokenizer)
            itemsize = shard_format(dataset.vocab_size)[2].itemsize
            for split in SPLITS:
                for shard in meta["splits"][split]["shards"]:
                    path = f"{folder}/{shard['file']}"  # no Path: there may be very many
                    try:
                        n_bytes = os.stat(path).st_size  # noqa: PTH116
                    except FileNotFoundError:
                        raise GptcError(f"the shard {path} is missing: {again}") from None
                    expected = HEADER_BYTES + shard["tokens"] * itemsize
                    if n_bytes != expected:
                        raise GptcError(
                            f"the shard {path} has {n_bytes} bytes instead of {expected}: {again}"
                        )
                    if dataset.is_chats:
                        mask_size(folder, shard)
        except OSError as e:
            raise GptcError(f"cannot read {e.filename}: {e.strerror}") from None
        except ValueError:  # of a name too
            raise GptcError(
                f"{folder / DATASET_FILE} was altered or is incomplete: {again}"
            ) from None
        return dataset

    @property
    def is_chats(self) -> bool:
        """Whether it has conversations: sequences of tokens that are not joined to one text."""
        return "chats" in self.meta

    def adopt(self, own: Tokenizer) -> None:
        """Takes over what the tokenizer of a model that is trained further says about texts.

        A dataset of conversations keeps its chat template, and the ends of texts that it has.
        """
        marks = self.tokenizer.marks
        self.tokenizer.adopt(own)
        if self.is_chats:
            ends = tuple(dict.fromkeys((*marks.ends, *self.tokenizer.marks.ends)))
            self.tokenizer.marks = replace(
                self.tokenizer.marks,
                ends=ends,
                chat_template=marks.chat_template,
                named_templates=marks.named_templates,
            )

    def keep_apart(self) -> None:
        """Lets the contexts of rows not read across documents: see `positions`.

        UsageError where no token ends documents.
        """
        if self.tokenizer.end_of_text is None:
            raise UsageError(
                f"--packing documents needs a token between documents, and the tokenizer of "
                f"{self.named} has none: prepare the text with another --tokenizer, such as "
                "bpe:2048 or gpt2, or use --packing stream"
            )
        self.document_end = self.tokenizer.end_of_text

    def positions(self, inputs: Tokens) -> Tokens | None:
        """The positions (B, T) of tokens (B, T) in their documents; None if these are not apart.

        The end of a document is the first token of the next one. A row may begin inside of one.
        """
        if self.document_end is None:
            return None
        at = np.arange(inputs.shape[-1], dtype=np.int32)
        begins = np.where(inputs == self.document_end, at, np.int32(0))
        return at - np.maximum.accumulate(begins, axis=-1)

    def masks(self, split: str) -> list[Path]:
        """The files with the kinds of the tokens of a split, in order; see data/sequences.py."""
        return [self.folder / shard["mask"]["file"] for shard in self._shards[split]]

    def kinds(self, split: str) -> Kinds:
        """The kind of each token of a split (N,): see data/kinds.py. They are read once.

        GptcError if a mask is not as long as its shard.
        """
        if split not in self._kinds:
            parts = [np.fromfile(path, np.uint8) for path in self.masks(split)]
            for shard, part in zip(self._shards[split], parts, strict=True):
                checksum = Checksum(recorded_checksum(shard["mask"]).partition(":")[0])
                checksum.update(part.data)
                self._check_content(shard["mask"], checksum.value())
            kinds = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
            if len(kinds) != self.n_tokens(split) or not (kinds[:1] & FIRST).all():
                raise GptcError(
                    f"a mask of {self.folder} is damaged: copy the dataset again, or prepare it "
                    "again with --force"
                )
            self._kinds[split] = kinds
        return self._kinds[split]

    def n_tokens(self, split: str) -> int:
        """The number of tokens of a split."""
        return self._begins[split][-1]

    def bytes_per_token(self, split: str) -> float:
        """Average number of text bytes in a token. Special tokens count, but have no bytes.

        Of conversations, the tokens are those that are targets by `train_on`.

        A loss in nats per token is loss / ln 2 / bytes_per_token bits per byte.
        """
        if not self.n_tokens(split):
            raise self.too_small(split, 1)
        if self.is_chats:
            return self._bytes_per_target(split)
        if not self.n_bytes(split):
            raise GptcError(
                f"the {split} split of {self.named} has no text, only end-of-text marks: prepare "
                "more text"
            )
        return self.n_bytes(split) / self.n_tokens(split)

    def _bytes_per_target(self, split: str) -> float:
        key = f"{split} {self.train_on}"
        targets = is_target(self.kinds(split), self.train_on)
        if key not in self._bytes:
            self._bytes[key], begin = 0, 0
            for block in self._blocks(split):
                some = block[targets[begin : begin + len(block)]]
                self._bytes[key] += self.tokenizer.count_bytes(some)
                begin += len(block)
        return self._bytes[key] / max(1, int(np.count_nonzero(targets)))

    def n_bytes(self, split: str) -> int:
        """The number of bytes of text in a split. Special tokens have none."""
        if split == ALL:
            return sum(map(self.n_bytes, SPLITS))
        if split not in self._bytes:
            recorded = int(self.meta["splits"][split]["bytes"])
            if self.meta["version"] < DATASET_VERSION and self.tokenizer.specials:
                recorded = sum(map(self.tokenizer.count_bytes, self._blocks(split)))
            self._bytes[split] = recorded
        return self._bytes[split]

    def shards(self, split: str) -> list[Path]:
        """The files that hold the tokens of a split, in order."""
        return [self.folder / shard["file"] for shard in self._shards[split]]

    def shard(self, split: str, i: int) -> Shard:
        """The tokens of the i-th shard of a split (N_i,), read-only. `read` gives parts of them.

        They are compared with vocab_size and the shard's checksum at the first call; GptcError
        names a shard that fails.
        """
        return read_shard(self._opened(self._shards[split][i]["file"]).path)

    def n_unknown(self) -> int:
        """Tokens of all splits for text that the tokenizer has no other token for."""
        unknown = self.tokenizer.unknown_id
        if unknown is None:
            return 0
        return sum(int(np.count_nonzero(block == unknown)) for block in self._blocks(ALL))

    def _blocks(self, split: str) -> Iterator[Shard]:
        for record in self._shards[split]:
            yield from self._opened(record["file"]).blocks()

    def _opened(self, name: str) -> OpenShard:
        """A shard by its file name. Its content is checked at the first call."""
        with self._lock:  # training reads in another thread
            if name in self._open:
                return self._open[name]
            path, record = self.folder / name, self._records[name]
            shard = open_shard(path)
            largest, found = shard.measured(recorded_checksum(record).partition(":")[0])
            if largest >= self.vocab_size:
                raise GptcError(
                    f"the shard {path} holds token {largest}, outside the vocabulary of "
                    f"{self.vocab_size}: prepare the dataset again with --force"
                )
            self._check_content(record, found)
            self._open[name] = shard
            return shard

    def _check_content(self, record: Mapping[str, Any], found: str) -> None:
        """GptcError unless the checksum of a shard's or mask's content is the recorded one."""
        if found != recorded_checksum(record):
            raise GptcError(
                f"the shard {self.folder / record['file']} is damaged (wrong checksum): copy the "
                "dataset again, or prepare it again with --force"
            )

    def read(self, split: str, begin: int, out: Tokens) -> None:
        """Fills `out` (n,) with the tokens of a split from position `begin` on, across shards."""
        begins = self._begins[split]
        i = bisect_right(begins, begin) - 1
        done = 0
        while done < len(out):
            shard = self._opened(self._shards[split][i]["file"])
            first = begin + done - begins[i]
            end = min(first + len(out) - done, begins[i + 1] - begins[i])
            out[done : done + end - first] = shard.read(first, end)
            done += end - first
            i += 1

    def too_small(self, split: str, n_needed: int) -> GptcError:
        """The error for a split with fewer than `n_needed` tokens."""
        n = self.n_tokens(split)
        fix = f"use --seq-len {n - 1} or less, or prepare more text" if n > 1 else ""
        if split == "val":
            fix = fix or "prepare it again with a larger --val-fraction"
        return GptcError(
            f"the {split} split of {self.named} has {n} token{'' if n == 1 else 's'} of "
            f"{n_needed} that are needed: {fix or 'prepare more text'}"
        )

    def describe(self) -> dict[str, Any]:
        """The values of `gptc info`: counts, tokenizer, a decoded sample of each split."""
        return {
            "folder": str(self.folder),
            "created_by": self.meta["created_by"],
            "sources": self.meta["sources"],
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.vocab_size,
            "splits": {split: self._describe(split) for split in SPLITS if self.n_tokens(split)},
        }

    def _describe(self, split: str) -> dict[str, Any]:
        n_seen = min(self.n_tokens(split), 10_000_000)  # enough to judge a vocabulary by
        seen = np.empty(n_seen, dtype=np.int32)
        self.read(split, 0, seen)
        return {
            "tokens": self.n_tokens(split),
            "bytes": self.n_bytes(split),
            **{
                k: n
                for k, n in self.meta["splits"][split].items()
                if k in ("documents", "rows", "said")
            },
            "bytes_per_token": self.bytes_per_token(split),
            "shards": len(self.shards(split)),
            "tokens_seen": n_seen,
            "vocab_used": int(np.count_nonzero(np.bincount(seen))),
            "sample": self.tokenizer.decode(seen[:200]),
        }

    def verify(self, progress: ProgressCallback | None = None) -> None:
        """Reads every shard. GptcError names one whose content has changed."""
        n_done, n_bytes = 0, sum(path.stat().st_size for s in SPLITS for path in self.shards(s))
        for split in SPLITS:
            for i, path in enumerate(self.shards(split)):
                shard = self.meta["splits"][split]["shards"][i]
                for file in (shard, shard["mask"]) if self.is_chats else (shard,):
                    found = self.folder / file["file"]
                    self._check_content(file, file_checksum(found, like=recorded_checksum(file)))
                self._opened(shard["file"])
                n_done += path.stat().st_size
                if progress:
                    progress("verifying", n_done, n_bytes)


def mask_size(folder: Path, shard: dict[str, Any]) -> None:
    """GptcError for a mask that is missing, or not as long as its shard."""
    path = folder / shard["mask"]["file"]
    again = "copy the dataset again, or prepare it again with --force"
    try:
        n_bytes = path.stat().st_size
    except FileNotFoundError:
        raise GptcError(f"the mask {path} is missing: {again}") from None
    if n_bytes != shard["tokens"]:
        raise GptcError(
            f"the mask {path} has {n_bytes} bytes instead of {shard['tokens']}: {again}"
        )


def counts(source: dict[str, Any]) -> str:
    """What was read of a source of dataset.json, if it is more than one document."""
    named = (("files", "file"), ("documents", "document"))
    found = [(source.get(key, 1), word) for key, word in named]  # old datasets do not say
    text = "".join(f", {plural(n, word)}" for n, word in found)
    if n_without := source.get("rows_without_text"):
        return f"{text}, {plural(n_without, 'row')} without text left out"
    return text if max(n for n, _ in found) > 1 else ""


def drawn(split: dict[str, Any]) -> str:
    """The documents or rows of a split of dataset.json, if it says how many."""
    if "rows" in split:
        return f", {plural(split['rows'], 'row')}, {split['said']:,} tokens of answers"
    n = split.get("documents")
    return "" if n is None else f", {plural(n, 'document')} drawn at random"
