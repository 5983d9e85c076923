"""`gptc ngram`: n-grams counted in a dataset, their loss and text that they write."""

from __future__ import annotations

import json
import math

import click

from gptc.cli.command import Command
from gptc.cli.complete import complete
from gptc.cli.params import COUNT, SIZE

_EPILOG = """\b
Examples:
  gptc ngram --data data/books                      orders up to 5 on its validation split
  gptc ngram --data book.txt --order 8 --sample 200
  gptc eval -m runs/tiny-book --ngram 5             next to the loss of a model
"""


@click.command("ngram", cls=Command, epilog=_EPILOG)
@click.option(
    "--data",
    default="stories",
    metavar="DIR",
    shell_complete=complete,
    help="Dataset folder, text file, or dataset name (see gptc prepare --help).  [stories]",
)
@click.option(
    "--tokenizer",
    default="bytes",
    metavar="KIND",
    help="Tokenizer for data not yet prepared.  [bytes]",
)
@click.option("--order", type=click.IntRange(1, 10), default=5, help="Largest order.  [5]")
@click.option("--split", type=click.Choice(["val", "train"]), default="val", help="Split.  [val]")
@click.option("--sample", type=COUNT, metavar="N", help="Tokens to write with the largest order.")
@click.option("--seed", type=SIZE, default=0, metavar="N", help="Random seed of the text.  [0]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ngram_command(
    data: str,
    tokenizer: str,
    order: int,
    split: str,
    sample: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Count n-grams in the training split and measure their loss.

    Interpolated, modified Kneser-Ney smoothing: a yardstick for models on the same data. Order 0
    has all tokens equally likely.
    """
    from gptc.data.preparation import resolve_dataset
    from gptc.eval.ngram import count_ngrams, evaluate_ngrams, write_text

    dataset = resolve_dataset(data, tokenizer, notify=lambda line: click.echo(line, err=True))
    model = count_ngrams(dataset, order)
    results = evaluate_ngrams(dataset, order, split, model)
    text = None
    if sample:
        text = dataset.tokenizer.decode(write_text(model, dataset, sample, seed))
    if as_json:
        rows = [{"order": k, "loss": r.loss, "bpb": r.bpb} for k, r in enumerate(results)]
        answer = {"data": str(dataset.folder), "split": split, "tokens": results[0].tokens}
        click.echo(json.dumps({**answer, "results": rows, "sample": text}, indent=2))
        return
    click.echo(f"n-grams of {data} ({split}, {results[0].tokens:,} tokens)")
    for k, result in enumerate(results):
        name = f"{k}-gram" if k else "uniform"
        click.echo(
            f"  {name:<7} loss {result.loss:.4f}  perplexity {math.exp(result.loss):.3f}  bits per "
            f"byte {result.bpb:.4f}"
        )
    if text is not None:
        click.echo(f"\n{text}")
