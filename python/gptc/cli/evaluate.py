"""`gptc eval`: a model's loss on a dataset, also with quantized weights."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.command import Command
from gptc.cli.complete import complete
from gptc.cli.declared import options_of
from gptc.cli.params import COUNT, SizeParam
from gptc.cli.ranks import agreed_model, agreed_threads
from gptc.cli.tasks import given_for_code, run_tasks
from gptc.data.options import TEXT_PACKING
from gptc.engine.options import CacheOptions, DeviceOptions, check_device
from gptc.errors import GptcError, UsageError
from gptc.files.words import quoted
from gptc.generation.options import Sampling

if TYPE_CHECKING:
    from gptc.data.dataset import Dataset
    from gptc.engine.world import World
    from gptc.eval.loss import Evaluation
    from gptc.formats.model_file import ModelFile

_EPILOG = """\b
Examples:
  gptc eval                                         the newest run, on its own dataset
  gptc eval -m runs/tiny-book --data data/other
  gptc eval -m runs/tiny-book --data other.txt      the whole file
  gptc eval --quantize int8 --quantize int4         the cost of quantization
  gptc eval --kv-dtype int8                         the cost of a rounded KV cache
  gptc eval --ngram 5                               the loss next to that of counting n-grams
  gptc eval --task hellaswag_val.jsonl --task stories    accuracy on multiple choice
  gptc eval --task HumanEval.jsonl --run-code       the share of programs that work
  mpirun -n 4 gptc eval                             the same figure, by four processes
"""


@click.command("eval", cls=Command, epilog=_EPILOG)
@click.option(
    "-m",
    "--model",
    metavar="PATH",
    type=click.Path(),
    help="Model: a run, folder, file, hub name or n-grams.  [the newest run]",
)
@click.option(
    "--data",
    metavar="DIR",
    shell_complete=complete,
    help="Dataset folder or name, or a text file.  [the model's own dataset]",
)
@click.option(
    "--split",
    type=click.Choice(["val", "train", "all"]),
    help="Split to evaluate.  [val; all for a text file in --data]",
)
@click.option("--batch-size", type=COUNT, default=8, metavar="N", help="Windows per batch.  [8]")
@click.option(
    "--seq-len", type=COUNT, metavar="N", help="Tokens per window.  [the model's context]"
)
@click.option(
    "--stride",
    type=COUNT,
    metavar="N",
    help="Tokens between the begins of windows, which then overlap.  [the window]",
)
@click.option(
    "--packing",
    type=click.Choice(TEXT_PACKING),
    help="Context of a token: all of its window before it (stream), or of its document alone "
    "(documents).  [as the model was trained]",
)
@click.option("--batches", type=COUNT, metavar="N", help="Number of batches, spread evenly.  [all]")
@click.option(
    "--quantize",
    multiple=True,
    type=click.Choice(["int8", "int4"]),
    help="Quantization to compare with. May be repeated.",
)
@click.option(
    "--ngram",
    type=SizeParam(min=1, max=1000),
    metavar="N",
    help="Order up to which to compare with n-grams, counted in the training split (Kneser-Ney).",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="FILE",
    shell_complete=complete,
    help="Rows of HellaSwag, ARC, PIQA, LAMBADA or HumanEval, or `stories`, in place of a loss. "
    "May be repeated.",
)
@click.option(
    "--run-code",
    is_flag=True,
    help="Run the programs that the model writes for a --task such as HumanEval, in a sandbox.",
)
@click.option(
    "--samples",
    type=SizeParam(min=1, max=10_000),
    metavar="N",
    help="Programs of each problem, for pass@k. One is greedy; several are drawn.  [1]",
)
@options_of(
    Sampling,
    unset=True,
    defaults={"temperature": "0; 0.8 for several", "top_p": "1; 0.95 for several"},
)
@options_of(DeviceOptions, without=("pin",), defaults={"dtype": "fp32"})
@options_of(CacheOptions)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def eval_command(
    context: click.Context,
    /,
    model: str | None,
    data: str | None,
    split: str | None,
    batch_size: int,
    seq_len: int | None,
    stride: int | None,
    packing: str | None,
    batches: int | None,
    quantize: tuple[str, ...],
    ngram: int | None,
    tasks: tuple[str, ...],
    run_code: bool,
    samples: int | None,
    device: str,
    dtype: str,
    threads: int,
    kv_dtype: str,
    as_json: bool,
    **given_sampling: Any,
) -> None:
    """Measure a model's loss on a dataset.

    The text is cut into windows that do not overlap, unless --stride is given. Each token but the
    first of all is predicted from those before it in its window, or from the last token of the
    window before; with --packing documents, from those of its document alone. Compare models with
    different tokenizers by bits per byte.
    """
    from gptc.eval.ngram_file import is_ngrams

    if model is not None and is_ngrams(model):
        from gptc.cli.counted import evaluate_counted, refuse_others

        refuse_others(context, {"model", "data", "split", "as_json"})
        evaluate_counted(Path(model), data, split, as_json)
        return
    from gptc.checkpoint.facade import on_newest
    from gptc.data.preparation import is_text_file
    from gptc.engine.world import join

    sampling = {k: v for k, v in given_sampling.items() if v is not None and v != ()}
    world = join()
    world.set_timeout(0)  # ranks work for as long as they need; a starter ends those that are left
    options = {"device": device, "threads": threads, "kv_dtype": kv_dtype}
    if tasks:
        _check_tasks(world, context.params)
        shown = _progress(as_json, "questions", "")
        options["dtype"] = dtype
        run_tasks(model, tasks, options, as_json, shown, run_code, samples, sampling)
        return
    if option := given_for_code(run_code, samples, sampling):
        raise UsageError(f"{option} is for --task FILE: add one")
    split = split or ("all" if data is not None and is_text_file(data) else "val")
    windows = _Windows(data, split, batch_size, seq_len, stride, packing, batches, kv_dtype)
    world.together(lambda: _check(world, device, ngram, split))
    options["threads"], model = agreed_threads(world, threads), agreed_model(world, model)
    dtypes = [dtype, *dict.fromkeys(quantize)]
    with world.ending_together():
        measured = on_newest(
            model, lambda file: _measure(file, windows, dtypes, options, world, as_json)
        )
    if world.rank == 0:
        _print(measured, windows, ngram, as_json)


def _check_tasks(world: World, params: dict[str, Any]) -> None:
    """GptcError for ranks, UsageError for an option of a loss: --task has neither."""
    if world.size > 1:
        raise world.refusal("--task asks its questions in one process: leave out mpirun")
    check_device(params["device"])
    for name in ("data", "split", "quantize", "ngram", "stride", "batches", "seq_len", "packing"):
        if params[name]:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is for a loss, and --task has questions: leave one out")


def _check(world: World, device: str, ngram: int | None, split: str) -> None:
    """GptcError for a device that ranks cannot share, UsageError for --ngram on what it counts."""
    world.check_device(device, "evaluate")
    check_device(device)
    if ngram and split != "val":
        raise UsageError(
            f"--ngram counts the training split, which --split {split} contains: use --split val"
        )


@dataclass(frozen=True)
class _Windows:
    """The windows that a loss is measured on, as the options name them."""

    data: str | None  # None = the dataset of the model's run
    split: str
    batch_size: int
    seq_len: int | None  # None = the model's context
    stride: int | None  # None = seq_len
    packing: str | None  # None = as the model was trained
    batches: int | None  # None = all
    kv_dtype: str

    def open(self, checkpoint: ModelFile, quiet: bool) -> tuple[Dataset, str]:
        """The dataset in the model's tokens, and its name. An error if it has no such windows."""
        from gptc.checkpoint.compatible import trained_packing
        from gptc.eval.loss import check_cache, check_windows

        dataset, name = _dataset(checkpoint, self.data, quiet)
        context = checkpoint.config.block_size
        if self.seq_len is not None and self.seq_len > context:
            raise UsageError(
                f"--seq-len is {self.seq_len}; the model's context allows at most {context}"
            )
        check_windows(dataset, self.split, self.seq_len or context, name)
        if dataset.is_chats and self.packing:
            raise UsageError(f"--packing {self.packing} is for texts, and {name} has conversations")
        if not dataset.is_chats and (self.packing or trained_packing(checkpoint)) == "documents":
            dataset.keep_apart()
        if self.kv_dtype != "auto":
            check_cache(dataset, self.kv_dtype)
        return dataset, name


@dataclass(frozen=True)
class _Measured:
    """The losses of a model on a dataset: a row (`_row`) for each data type and KV cache."""

    checkpoint: ModelFile
    dataset: Dataset
    name: str  # of the dataset
    rows: list[dict[str, Any]]


def _measure(
    checkpoint: ModelFile,
    windows: _Windows,
    dtypes: list[str],
    options: dict[str, Any],
    world: World,
    as_json: bool,
) -> _Measured:
    """The losses of a model, by all ranks. `options` are those of `load_model`."""
    from gptc.checkpoint.facade import load_model
    from gptc.eval.loss import evaluate

    quiet = as_json or world.rank > 0
    opened = partial(windows.open, checkpoint, world.rank > 0)
    if world.size > 1:  # ranks of a host share its files
        world.together(lambda: None if world.local_rank else opened())
    dataset, name = world.together(opened)
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        load = partial(load_model, checkpoint, dtype=dtype, max_batch=windows.batch_size, **options)
        with world.together(load) as gpt:
            for cache in (None,) if windows.kv_dtype == "auto" else ("auto", windows.kv_dtype):
                result = evaluate(
                    gpt,
                    dataset,
                    windows.split,
                    batch_size=windows.batch_size,
                    seq_len=windows.seq_len,
                    n_batches=windows.batches,
                    kv_dtype=cache,
                    stride=windows.stride,
                    world=world,
                    progress=_progress(quiet, gpt.dtype),
                )
                first = rows[0]["bpb"] if rows else None
                rows.append(_row(gpt.dtype, cache, _packing(dataset), result, first))
    return _Measured(checkpoint, dataset, name, rows)


def _print(measured: _Measured, windows: _Windows, ngram: int | None, as_json: bool) -> None:
    """The losses as lines or as JSON, with those of n-grams up to an order."""
    checkpoint, dataset, rows = measured.checkpoint, measured.dataset, measured.rows
    split = windows.split
    if split == "all" and _is_training_data(checkpoint, windows.data):
        click.echo(
            "note: the model was trained on a part of this text; --split val measures the rest",
            err=True,
        )
    counted = _count(dataset, split, ngram, rows[0]) if ngram else []
    if as_json:
        answer: dict[str, Any] = {"model": str(checkpoint.path), "data": str(dataset.folder)}
        answer |= {"split": split, "results": rows} | ({"ngrams": counted} if ngram else {})
        click.echo(json.dumps(answer, indent=2))
        return
    contexts = "by document, " if _packing(dataset) == "documents" else ""
    tokens = f"{split}, {contexts}{rows[0]['tokens']:,} tokens"
    click.echo(f"{checkpoint.path} on {measured.name} ({tokens})")
    _print_rows(rows)
    _print_ngrams(counted)


def _packing(dataset: Dataset) -> str | None:
    """The --packing that a dataset is measured with; None = it has conversations."""
    if dataset.is_chats:
        return None
    return "stream" if dataset.document_end is None else "documents"


def _row(
    dtype: str, cache: str | None, packing: str | None, result: Evaluation, first: float | None
) -> dict[str, Any]:
    """A row of the answer; `first` is the bits per byte of the first one, None = this is it."""
    return {
        "dtype": dtype,
        **({"kv_dtype": cache} if cache else {}),
        **({"packing": packing} if packing else {}),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bpb": result.bpb,
        "tokens": result.tokens,
        "cost": 0.0 if first is None else result.bpb / first - 1,
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    caches = {"auto": ", exact cache", "int8": ", int8 cache"}
    names = [row["dtype"] + caches.get(row.get("kv_dtype", ""), "") for row in rows]
    width = max(5, *map(len, names))
    for name, row in zip(names, rows, strict=True):
        cost = f"  {row['cost']:+.2%}" if row is not rows[0] else ""
        click.echo(
            f"  {name:<{width}} loss {row['loss']:.4f}  perplexity {row['perplexity']:.3f}  "
            f"bits per byte {row['bpb']:.4f}{cost}"
        )


def _count(dataset: Dataset, split: str, order: int, model: dict[str, Any]) -> list[dict[str, Any]]:
    """The losses of n-grams up to an order, from uniform on; `model` is the row of the model."""
    from gptc.eval.ngram import evaluate_ngrams

    return [
        {"order": k, "loss": result.loss, "bpb": result.bpb, "model": model["bpb"] / result.bpb - 1}
        for k, result in enumerate(evaluate_ngrams(dataset, order, split))
    ]


def _print_ngrams(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        name = f"{row['order']}-gram" if row["order"] else "uniform"
        click.echo(
            f"  {name:<7} loss {row['loss']:.4f}  perplexity {math.exp(row['loss']):.3f}  bits per "
            f"byte {row['bpb']:.4f}  (the model: {row['model']:+.1%})"
        )


def _dataset(checkpoint: ModelFile, data: str | None, quiet: bool) -> tuple[Dataset, str]:
    """The named dataset, else that of the checkpoint's run, in the model's tokens; and its name."""
    from gptc.checkpoint.compatible import check_vocabulary, tokenizer_argument
    from gptc.data.chat_cache import is_chat_file, resolve_chats
    from gptc.data.preparation import resolve_dataset

    def notify(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    on_bad_row = _on_bad_row(checkpoint) if _is_training_data(checkpoint, data) else "stop"
    if data is None:
        trained = _trained_data(checkpoint)
        if trained is None:
            raise GptcError(f"{checkpoint.path} records no dataset: give one with --data")
        if len(trained) > 1:
            raise UsageError(
                f"the run was trained on {', '.join(trained)}: name one of these with --data"
            )
        data = trained[0]
    own = checkpoint.tokenizer()
    if is_chat_file(data):
        try:
            return resolve_chats(data, own, on_bad_row=on_bad_row, notify=notify), data
        except GptcError as error:
            if "--on-bad-row" not in str(error):
                raise
            raise GptcError(
                f"{error}; that is an option of: gptc prepare {quoted(data)} --tokenizer "
                f"{quoted(checkpoint.path)} --out DIR"
            ) from error.__cause__
    argument = tokenizer_argument(own, checkpoint, data)
    dataset = resolve_dataset(data, argument, notify=notify)
    check_vocabulary(checkpoint, own, dataset)
    return dataset, data


def _run_options(checkpoint: ModelFile) -> dict[str, Any]:
    """The options of the checkpoint's run; empty = not known."""
    from gptc.checkpoint.reader import Checkpoint

    trainer = checkpoint.trainer() if isinstance(checkpoint, Checkpoint) else None
    found: dict[str, Any] = (trainer or {}).get("options", {})
    return found


def _on_bad_row(checkpoint: ModelFile) -> str:
    """How the checkpoint's run has treated rows that are not conversations."""
    return "skip" if _run_options(checkpoint).get("on_bad_row") == "skip" else "stop"


def _trained_data(checkpoint: ModelFile) -> list[str] | None:
    """The datasets that the checkpoint's run was trained on, without weights; None = not known."""
    data = _run_options(checkpoint).get("data")
    if data is None or isinstance(data, str):
        return None if data is None else [data]
    return [text.rpartition(":")[0] for text in data]


def _is_training_data(checkpoint: ModelFile, data: str | None) -> bool:
    """Whether --data (None = not given) is data of the checkpoint's run, or a part of it."""
    trained = _trained_data(checkpoint) or []
    return bool(trained) and (
        data is None or Path(data).resolve() in [Path(name).resolve() for name in trained]
    )


def _progress(quiet: bool, dtype: str, unit: str = " tokens") -> Any:
    """Shows a counter on a terminal; else nothing."""
    shown = sys.stderr.isatty() and not quiet

    def show(done: int, total: int) -> None:
        if shown:
            end = "\r\x1b[K" if done == total else ""
            click.echo(f"\r{dtype}: {done:,} of {total:,}{unit}{end}", nl=False, err=True)

    return show
