"""Shows which tokens of conversations are learned, for `gptc info DATA --show-mask`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptc.errors import UsageError, printable

if TYPE_CHECKING:
    from gptc.data.dataset import Dataset
    from gptc.data.options import TrainOn

_ROWS = 3
_MOST_TOKENS = 600  # of a row


def show_masks(path: Path, train_on: TrainOn) -> None:
    """Prints the first rows of a dataset: learned tokens plain or in brackets, others dim."""
    from gptc.data.dataset import Dataset
    from gptc.data.description import DATASET_FILE

    if not (path / DATASET_FILE).is_file() or not (dataset := Dataset.open(path)).is_chats:
        raise UsageError(
            f"--show-mask is for a dataset of conversations, and {path} is none: make one with "
            "gptc prepare chats.jsonl --tokenizer MODEL --out DIR"
        )
    dataset.train_on = train_on
    for line in rows(dataset, "train", sys.stdout.isatty()):
        click.echo(line)


def rows(dataset: Dataset, split: str, colour: bool) -> Iterator[str]:
    """The text of the first rows of a split."""
    from gptc.data.kinds import is_target
    from gptc.data.sequences import Sequences
    from gptc.files.words import plural

    sequences = Sequences(dataset, split)
    targets = is_target(sequences.kinds, dataset.train_on)
    for i in range(min(_ROWS, len(sequences))):
        tokens, begin = sequences.tokens(i, _MOST_TOKENS), int(sequences.begins[i])
        learned = targets[begin : begin + len(tokens)].tolist()
        n_learned = int(targets[begin : begin + int(sequences.sizes[i])].sum())
        size = plural(int(sequences.sizes[i]), "token")
        yield f"---- {split} {i + 1}: {size}, {n_learned:,} of them learned"
        text, first = "", 0
        for at in range(1, len(tokens) + 1):
            if at == len(tokens) or learned[at] != learned[first]:
                said = dataset.tokenizer.decode(tokens[first:at], continued=True)
                text += _styled(said, learned[first], colour)
                first = at
        yield text + (" …" if len(tokens) < int(sequences.sizes[i]) else "")


def _styled(text: str, learned: bool, colour: bool) -> str:
    lines = "\n".join(printable(line) for line in text.split("\n"))
    if colour:
        return lines if learned else click.style(lines, dim=True)
    return f"[{lines}]" if learned else lines
