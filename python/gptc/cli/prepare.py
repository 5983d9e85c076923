"""`gptc prepare`: any bytes to token shards."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptc.cli.params import COUNT, SIZE
from gptc.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from gptc.data.dataset import Dataset
    from gptc.data.readers import Errors
    from gptc.files.download import ProgressCallback

_EPILOG = """\b
Examples:
  gptc prepare stories --out data/stories
  gptc prepare shakespeare --tokenizer char --out data/shakespeare
  gptc prepare books/ notes.txt --tokenizer gpt2 --out data/books
  gptc prepare crawl.jsonl.zst --text-field content --tokenizer bpe:8192 --out data/crawl
  gptc prepare src/ --include '*.py' --exclude 'test_*' --out data/code
  zcat dump.gz | gptc prepare - --val-tokens 1M --out data/dump
"""


@click.command("prepare", epilog=_EPILOG)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the dataset.",
)
@click.option(
    "--tokenizer",
    default="bytes",
    show_default=True,
    metavar="KIND",
    help="bytes, char, bpe:SIZE (learned from the text), gpt2 or another encoding of tiktoken, a "
    "tokenizer.json, a SentencePiece .model, or the folder of a dataset, checkpoint or run, whose "
    "tokenizer is then used.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Take only such files of a folder. May be repeated.",
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave out such files. May be repeated."
)
@click.option(
    "--text-field",
    default="text",
    show_default=True,
    metavar="NAME",
    help="The field or column with the text of .jsonl, .csv, .tsv and .parquet.",
)
@click.option("--raw", is_flag=True, help="Take files as they are: unpack nothing, read no rows.")
@click.option(
    "--errors",
    type=click.Choice(["strict", "replace", "bytes"]),
    default="strict",
    show_default=True,
    help="Bytes that are not UTF-8, when the tokenizer needs text.",
)
@click.option(
    "--val-fraction",
    type=float,
    metavar="FRACTION",
    help="Part of the text, at its end, to validate on; whole documents, if there are several.  "
    "[default: what a known dataset sets apart, else 0.1]",
)
@click.option("--val-tokens", type=SIZE, metavar="N", help="Validate on the last N tokens instead.")
@click.option(
    "--shard-tokens",
    type=COUNT,
    default="100M",
    show_default=True,
    metavar="N",
    help="Tokens in a file.",
)
@click.option("--jobs", type=COUNT, metavar="N", help="Threads that encode.  [default: one a core]")
@click.option(
    "--stories-bytes",
    type=COUNT,
    default="5M",
    show_default=True,
    metavar="N",
    help="Size of stories and of stories-wide.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Chooses the text of these.",
)
@click.option("--force", is_flag=True, help="Replace the dataset that DIR holds.")
@click.option("--json", "as_json", is_flag=True, help="Print dataset.json instead of a summary.")
def prepare_command(
    sources: tuple[str, ...],
    out: Path,
    tokenizer: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    text_field: str,
    raw: bool,
    errors: Errors,
    val_fraction: float | None,
    val_tokens: int | None,
    shard_tokens: int,
    jobs: int | None,
    stories_bytes: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Turn any bytes into a dataset to train on.

    SOURCE is a file, a folder (every file below it), a glob, - for standard input, an http(s) URL,
    or a known dataset: stories (built in, the default), stories-wide (built in, more plots),
    shakespeare, tinystories, openwebtext, fineweb-10b or fineweb-edu-10b (downloaded). Several are
    joined in order. Compressed files and archives (.gz .bz2 .xz .zst .zip .tar) are unpacked;
    .jsonl, .csv, .tsv and .parquet give a document a row. Documents (files, rows, texts
    between two <|endoftext|>) stay whole in one split. The same command resumes after the last
    finished shard. Sizes take suffixes: 64K, 2M, 1G.
    """
    from gptc.checkpoint.find import tokenizer_name
    from gptc.data import prepare
    from gptc.data.job import WORK_FOLDER
    from gptc.tokenizer.registry import bpe_size

    if val_tokens is not None and val_fraction is not None:
        raise UsageError("--val-fraction and --val-tokens exclude each other: give one of them")
    asked = bpe_size(tokenizer)

    try:
        with progress_bars() as progress:
            dataset = prepare(
                sources or ("stories",),
                out,
                tokenizer=tokenizer_name(tokenizer),
                val_fraction=val_fraction,
                val_tokens=val_tokens,
                shard_tokens=shard_tokens,
                jobs=jobs,
                force=force,
                stories_bytes=stories_bytes,
                seed=seed,
                include=include,
                exclude=exclude,
                text_field=text_field,
                errors=errors,
                raw=raw,
                progress=progress,
                notify=lambda line: click.echo(line, err=True),
            )
    except KeyboardInterrupt:
        if (out / WORK_FOLDER).exists():
            click.echo(
                "the finished shards are kept: the same command continues after them", err=True
            )
        raise
    if asked is not None and dataset.vocab_size < asked:
        click.echo(
            f"note: {asked:,} tokens were asked for, and the text has pairs for no more than "
            f"{dataset.vocab_size:,}",
            err=True,
        )
    click.echo(json.dumps(dataset.meta, indent=2) if as_json else _summary(dataset))


def _summary(dataset: Dataset) -> str:
    from gptc.files.words import plural

    splits = [split for split in ("train", "val") if dataset.n_tokens(split)]
    width = max(len(plural(dataset.n_tokens(split), "token")) for split in splits)
    lines = []
    for source in dataset.meta["sources"]:
        name = "standard input" if source["source"] == "-" else source["source"]
        lines.append(
            f"read   {name}: {source['bytes']:,} bytes"
            + (f", licence {source['licence']}" if "licence" in source else "")
        )
    lines.append(f"tokens {dataset.tokenizer.kind}, a vocabulary of {dataset.vocab_size:,}")
    for split in splits:
        n_shards = len(dataset.shards(split))
        lines.append(
            f"{split:<6} {plural(dataset.n_tokens(split), 'token'):>{width}}, "
            f"{dataset.bytes_per_token(split):.2f} bytes per token, {plural(n_shards, 'shard')}"
        )
    was = "is already there" if dataset.already_there else "is written"
    lines.append(f"The dataset {was}: {dataset.folder}")
    lines.append(f"Next: gptc train --data {shlex.quote(str(dataset.folder))}")
    return "\n".join(lines)


@contextmanager
def progress_bars() -> Iterator[ProgressCallback | None]:
    """A progress callback that draws a bar for each action on standard error, if a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(action: str, n_done: int, n_bytes: int | None) -> None:
            if action not in tasks:
                tasks[action] = bars.add_task(action, total=n_bytes)
            bars.update(tasks[action], completed=n_done, total=n_bytes)

        yield progress
