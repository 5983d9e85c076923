"""Every option of a dataset's preparation, declared once: see gptc.settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from gptc.errors import UsageError
from gptc.settings import check, option

Errors: TypeAlias = Literal["strict", "replace", "bytes"]
TrainOn: TypeAlias = Literal["assistant", "completion", "all"]
LongRows: TypeAlias = Literal["cut", "drop"]
Packing: TypeAlias = Literal["pad", "fit"]
TextPacking: TypeAlias = Literal["stream", "documents"]

TRAIN_ON: tuple[TrainOn, ...] = get_args(TrainOn)
LONG_ROWS: tuple[LongRows, ...] = get_args(LongRows)
PACKING: tuple[Packing, ...] = get_args(Packing)
TEXT_PACKING: tuple[TextPacking, ...] = get_args(TextPacking)

MAX_SHARD_TOKENS = 2**31 - 1  # the count in the header is an int32
SHARD_TOKENS = 100_000_000
STORIES_BYTES = 5_000_000
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes a dataset."""

    tokenizer: str = option(
        "bytes",
        "Tokenizer: bytes, char, bpe:SIZE (learned from the text), gpt2 or another encoding of "
        "tiktoken, a tokenizer.json, a SentencePiece .model, a model's file, or the "
        "folder of a dataset, checkpoint or run.",
        metavar="KIND",
    )
    include: tuple[str, ...] = option(
        (), "Files of a folder or archive to take. May be repeated.", metavar="GLOB"
    )
    exclude: tuple[str, ...] = option(
        (),
        "Files and folders of a folder or archive to leave out. May be repeated.",
        metavar="GLOB",
    )
    text_field: str = option(
        "text", "Field or column with the text of .jsonl, .csv, .tsv and .parquet.", metavar="NAME"
    )
    raw: bool = option(False, "Take files as they are: unpack nothing, read no rows.")
    errors: Literal["strict", "replace", "bytes"] = option(
        "strict",
        "Treatment of bytes that are not UTF-8, when the tokenizer needs text.",
        choices=get_args(Errors),
    )
    chat_template: str | None = option(
        None,
        "Chat template for rows of messages: a file in Jinja, or the name of one of the model's.",
        metavar="FILE",
        shown="the model's, else ChatML",
    )
    on_bad_row: Literal["stop", "skip"] = option(
        "stop",
        "Treatment of a row of messages that is not a conversation.",
        choices=("stop", "skip"),
    )
    val_fraction: float | None = option(
        None,
        "Part of the text to validate on; whole documents, if there are several.",
        least=0,
        below=1,
        shown=f"the validation files of a known dataset, else {VAL_FRACTION}",
    )
    val_by: Literal["order", "random"] | None = option(
        None,
        "Documents to validate on: the last ones, or drawn at random.",
        choices=("order", "random"),
        shown="random; order for stories and for a text that is one document",
    )
    val_tokens: int | None = option(
        None, "Tokens at the end of the text to validate on, instead of a fraction.", least=0
    )
    shard_tokens: int = option(
        SHARD_TOKENS, "Tokens in a shard.", least=1, most=MAX_SHARD_TOKENS, shown="100M"
    )
    jobs: int | None = option(None, "Threads that encode.", least=1, shown="one per core")
    stories_bytes: int = option(
        STORIES_BYTES, "Size of stories and of stories-wide.", least=1, shown="5M"
    )
    seed: int = option(
        0, "Random seed of stories, of stories-wide and of --val-by random.", least=0
    )

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(self) -> None:
        """UsageError for a value outside its range, or values that contradict each other."""
        check(self)
        if self.val_tokens is not None and self.val_fraction is not None:
            raise UsageError("--val-fraction and --val-tokens exclude each other: give one of them")
        if self.val_tokens is not None and self.val_by == "random":
            raise UsageError(
                "--val-tokens takes the end of the text, and --val-by random whole documents: give "
                "--val-fraction, or --val-by order"
            )
