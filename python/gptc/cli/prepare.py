"""`gptc prepare`: any bytes to token shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.command import Command
from gptc.cli.declared import options_of
from gptc.data.options import PrepareOptions
from gptc.errors import UsageError
from gptc.files.words import quoted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from gptc.data.crew import Crew
    from gptc.data.dataset import Dataset
    from gptc.files.download import ProgressCallback

_EPILOG = """\b
Examples:
  gptc prepare stories --out data/stories
  gptc prepare shakespeare --tokenizer char --out data/shakespeare
  gptc prepare books/ notes.txt --tokenizer gpt2 --out data/books
  gptc prepare crawl.jsonl.zst --text-field content --tokenizer bpe:8192 --out data/crawl
  gptc prepare chats.jsonl --tokenizer runs/tiny-stories --out data/chats
  gptc prepare src/ --include '*.py' --exclude 'test_*' --out data/code
  zcat dump.gz | gptc prepare - --val-tokens 1M --out data/dump
  mpirun -n 4 gptc prepare crawl.jsonl --tokenizer gpt2 --out data/crawl    four processes encode
"""


@click.command("prepare", cls=Command, epilog=_EPILOG)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1, type=click.Path())
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the dataset.",
)
@options_of(PrepareOptions)
@click.option("--force", is_flag=True, help="Replace the dataset that DIR holds.")
@click.option("--json", "as_json", is_flag=True, help="Print dataset.json instead of a summary.")
def prepare_command(
    sources: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn any bytes into a dataset to train on.

    SOURCE is a file, a folder (every file below it), a glob, - for standard input, an http(s) URL,
    or a known dataset: stories (built in, the default), stories-wide (built in, more plots),
    shakespeare, tinystories, openwebtext, fineweb-10b or fineweb-edu-10b (downloaded). Several are
    joined in order. Compressed files and archives (.gz .bz2 .xz .zst .zip .tar) are unpacked;
    .jsonl, .csv, .tsv and .parquet give a document a row, or a conversation (`messages`, `prompt`
    and `completion`, `instruction` and `output`, `conversations`), written by the chat template of
    --tokenizer. Documents (files, rows, texts
    between two <|endoftext|>) stay whole in one split; some are drawn at random to validate on.
    The same command resumes after the last
    finished shard. Sizes take suffixes: 64K, 2M, 1G.
    """
    from gptc.data.crew import Crew, serve
    from gptc.engine.world import join

    world, crew = join(), None
    if world.size > 1:
        world.set_timeout(0)  # a rank may read for long; a starter ends those that are left
        options["jobs"] = jobs = options["jobs"] or world.share_of_cores()
        if world.rank:
            with world.ending_together():
                serve(world, jobs)
            return
        crew = Crew(world, jobs)
    with crew or nullcontext():
        dataset = _prepare(sources or ("stories",), out, force, crew, options)
    click.echo(json.dumps(dataset.meta, indent=2) if as_json else _summary(dataset))


def _prepare(
    sources: tuple[str, ...], out: Path, force: bool, crew: Crew | None, options: dict[str, Any]
) -> Dataset:
    """The dataset. Shows progress and notes."""
    from gptc.checkpoint.find import tokenizer_name
    from gptc.data.job import WORK_FOLDER
    from gptc.data.preparation import prepare
    from gptc.tokenizer.registry import bpe_size

    def notify(line: str) -> None:
        click.echo(line, err=True)

    if crew is not None and "-" in sources:  # https://github.com/openpmix/prrte/issues/2579
        raise UsageError(
            "several ranks do not read the standard input, which mpirun may repeat or not end: "
            "name a file or a named pipe (mkfifo), or use one process"
        )
    asked = bpe_size(options["tokenizer"])
    options["tokenizer"] = tokenizer_name(options["tokenizer"])
    try:
        with progress_bars() as progress:
            dataset = prepare(
                sources, out, force=force, progress=progress, notify=notify, crew=crew, **options
            )
    except KeyboardInterrupt:
        if (out / WORK_FOLDER).exists():
            notify("the finished shards are kept: the same command continues after them")
        raise
    if asked is not None and dataset.vocab_size < asked:
        notify(
            f"note: {asked:,} tokens were asked for, and the text has pairs for no more than "
            f"{dataset.vocab_size:,}"
        )
    return dataset


def _summary(dataset: Dataset) -> str:
    from gptc.data.dataset import counts, drawn
    from gptc.files.words import plural

    splits = [split for split in ("train", "val") if dataset.n_tokens(split)]
    width = max(len(plural(dataset.n_tokens(split), "token")) for split in splits)
    lines = []
    for source in dataset.meta["sources"]:
        name = "standard input" if source["source"] == "-" else source["source"]
        lines.append(
            f"read   {name}: {source['bytes']:,} bytes"
            + counts(source)
            + (f", licence {source['licence']}" if "licence" in source else "")
        )
    lines.append(f"tokens {dataset.tokenizer.kind}, a vocabulary of {dataset.vocab_size:,}")
    for split in splits:
        n_shards = len(dataset.shards(split))
        lines.append(
            f"{split:<6} {plural(dataset.n_tokens(split), 'token'):>{width}}, "
            f"{dataset.bytes_per_token(split):.2f} bytes per token, {plural(n_shards, 'shard')}"
            + drawn(dataset.meta["splits"][split])
        )
    was = "is already there" if dataset.already_there else "is written"
    lines.append(f"The dataset {was}: {dataset.folder}")
    command = "finetune -m MODEL" if dataset.is_chats else "train"
    lines.append(f"Next: gptc {command} --data {quoted(dataset.folder)}")
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
