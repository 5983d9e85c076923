"""`gptc ngram`: n-grams counted in a dataset, their loss and text that they write."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gptc.cli.command import Command
from gptc.cli.complete import complete
from gptc.cli.params import COUNT, SIZE, SizeParam
from gptc.data.known import KNOWN_DATASETS
from gptc.errors import UsageError

_EPILOG = """\b
Examples:
  gptc ngram data/books                             orders up to 5 on its validation split
  gptc ngram book.txt --order 8 --sample 200
  gptc ngram data/books --order 6 --out models/books-6gram
  gptc infer -m models/books-6gram -p "Once"
  gptc eval -m runs/tiny-book --ngram 5             next to the loss of a model
"""


@click.command("ngram", cls=Command, epilog=_EPILOG)
@click.argument("named", required=False, metavar="[DATA]", shell_complete=complete)
@click.option(
    "--data",
    metavar="DIR",
    shell_complete=complete,
    help="The same as DATA.",
)
@click.option(
    "--tokenizer",
    default="bytes",
    metavar="KIND",
    help="Tokenizer for data not yet prepared.  [bytes]",
)
@click.option(
    "--order",
    type=SizeParam(min=1, max=1000),
    default=5,
    metavar="N",
    help="Largest order, at most 1,000.  [5]",
)
@click.option("--split", type=click.Choice(["val", "train"]), default="val", help="Split.  [val]")
@click.option("--sample", type=COUNT, metavar="N", help="Tokens to write with the largest order.")
@click.option("--seed", type=SIZE, default=0, metavar="N", help="Random seed of the text.  [0]")
@click.option(
    "--tokens",
    type=COUNT,
    metavar="N",
    help="Training tokens to count.  [10M, or fewer of an order above 17]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the n-grams, which gptc infer and eval take as a model.",
)
@click.option("--force", is_flag=True, help="Replace existing n-grams in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ngram_command(
    named: str | None,
    data: str | None,
    tokenizer: str,
    order: int,
    split: str,
    sample: int | None,
    seed: int,
    tokens: int | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Count n-grams in the training split of DATA and measure their loss.

    DATA is a dataset folder, a text file, or a dataset name (see gptc prepare --help), by default
    stories.
    Interpolated, modified Kneser-Ney smoothing: a yardstick for models on the same data. Order 0
    has all tokens equally likely.
    """
    if named is not None and data is not None:
        raise UsageError("DATA and --data exclude each other: give one of them")
    from gptc.cli.counted import print_orders, rows_of
    from gptc.data.preparation import resolve_dataset
    from gptc.eval.ngram import count_ngrams, evaluate_ngrams, write_text
    from gptc.eval.ngram_file import check_free, save_ngrams

    data = named or data or "stories"
    if out is not None:
        check_free(out, force)
    dataset = resolve_dataset(data, tokenizer, notify=lambda line: click.echo(line, err=True))
    model = count_ngrams(dataset, order, tokens)
    if out is not None:
        source = data if data in KNOWN_DATASETS else str(Path(data).resolve())
        save_ngrams(out, model, dataset.tokenizer, source, force)
    results = evaluate_ngrams(dataset, order, split, model)
    text = None
    if sample:
        text = dataset.tokenizer.decode(write_text(model, dataset, sample, seed))
    if as_json:
        answer = {"data": str(dataset.folder), "split": split, "tokens": results[0].tokens}
        click.echo(json.dumps({**answer, "results": rows_of(results), "sample": text}, indent=2))
        return
    click.echo(f"n-grams of {data} ({split}, {results[0].tokens:,} tokens)")
    print_orders(results)
    if out is not None:
        click.echo(f"wrote {out}", err=True)
    if text is not None:
        click.echo(f"\n{text}")
