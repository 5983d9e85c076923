"""`gptc infer` and `gptc eval` of counted n-grams, in place of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gptc.errors import GptcError, UsageError
from gptc.files.words import quoted
from gptc.generation.options import Sampling

if TYPE_CHECKING:
    from gptc.eval.loss import Evaluation
    from gptc.eval.ngram_file import NgramFile


TAKEN = {
    *("model", "prompt", "prompt_file", "no_echo", "as_json", "max_tokens", "num_samples", "stop"),
    *(field.name for field in fields(Sampling)),
}
"""The options of `gptc infer` that n-grams take."""


def refuse_others(context: click.Context, taken: set[str]) -> None:
    """UsageError for an option of the command line that n-grams do not take."""
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if param.name not in taken and source == click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{param.opts[0]} needs a model, and {context.params['model']} holds n-grams: "
                "leave it out"
            )


def write_samples(
    path: Path, prompt: str, options: dict[str, Any], as_json: bool, echo: bool, told: bool
) -> None:
    """Prints texts that n-grams continue; `told`: the seed was drawn, so it is told."""
    from gptc.cli.prompts import as_text
    from gptc.cli.writer import write_out
    from gptc.eval.ngram_file import open_ngrams

    file = open_ngrams(path)
    samples = []
    for i in range(options["num_samples"]):
        seed = (options["sampling"].seed + i) % 2**63
        sampling = replace(options["sampling"], seed=seed)
        pieces = _pieces(file, prompt, sampling, options["max_tokens"], options["stop"])
        if as_json:
            samples.append({"text": "".join(pieces)})
            continue
        several = options["num_samples"] > 1
        write_out((f"--- sample {i + 1} ---\n" if several else "") + (prompt if echo else ""))
        for piece in pieces:
            write_out(piece)
        write_out("\n")
    if as_json:
        answer = {"model": str(path), "prompt": prompt, "seed": options["sampling"].seed}
        click.echo(as_text({**answer, "samples": samples}, indent=2))
    elif told:
        click.echo(f"seed {options['sampling'].seed}", err=True)


def _pieces(
    file: NgramFile, prompt: str, sampling: Sampling, most: int, stop: tuple[str, ...]
) -> Iterator[str]:
    """The continuation of a prompt, up to a stop string or `most` tokens."""
    from gptc.generation.request import prompt_tokens
    from gptc.generation.sampling import StopFilter, sample_token
    from gptc.tokenizer.base import StreamDecoder

    history = list(prompt_tokens(file.tokenizer, prompt))
    decoder, stopping = StreamDecoder(file.tokenizer), StopFilter(stop)
    for _ in range(most):
        logits = np.log(file.model.probabilities(history)).astype(np.float32)
        history.append(sample_token(logits, sampling, len(history), len(logits), history))
        yield stopping.push(decoder.push(history[-1]))
        if stopping.stopped:
            return
    yield stopping.push(decoder.flush()) + stopping.flush()


def evaluate_counted(path: Path, data: str | None, split: str | None, as_json: bool) -> None:
    """Prints the loss of each order on a split of a dataset, by default of what was counted."""
    from gptc.data.preparation import is_text_file, resolve_dataset
    from gptc.eval.ngram import evaluate_ngrams
    from gptc.eval.ngram_file import open_ngrams

    file = open_ngrams(path)
    own = file.meta["data"]
    split = split or ("all" if data is not None and is_text_file(data) else "val")
    data = data or own
    if split != "val" and Path(data).resolve() == Path(own).resolve():
        click.echo("note: the n-grams were counted in this text; --split val is the rest", err=True)
    kind = file.tokenizer.kind
    name = kind if kind in ("bytes", "gpt2") else str(path)
    dataset = resolve_dataset(data, name, notify=lambda line: click.echo(line, err=True))
    if dataset.tokenizer.fingerprint() != file.tokenizer.fingerprint():
        raise GptcError(
            f"{data} has other tokens than {path}: count it with gptc ngram {quoted(data)}"
        )
    results = evaluate_ngrams(dataset, file.model.order, split, file.model)
    if as_json:
        answer = {"model": str(path), "data": str(dataset.folder), "split": split}
        click.echo(json.dumps({**answer, "results": rows_of(results)}, indent=2))
        return
    click.echo(f"{path} on {data} ({split}, {results[0].tokens:,} tokens)")
    print_orders(results)


def rows_of(results: list[Evaluation]) -> list[dict[str, Any]]:
    """A row of JSON for each order, from uniform on."""
    return [
        {"order": k, "loss": r.loss, "bpb": r.bpb, "tokens": r.tokens}
        for k, r in enumerate(results)
    ]


def print_orders(results: list[Evaluation]) -> None:
    """Prints a line for each order, from uniform on."""
    for k, result in enumerate(results):
        name = f"{k}-gram" if k else "uniform"
        click.echo(
            f"  {name:<7} loss {result.loss:.4f}  perplexity {math.exp(result.loss):.3f}  bits per "
            f"byte {result.bpb:.4f}"
        )
