"""`gptc train`: from scratch, resumed, or fine-tuned."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.params import COUNT, SIZE
from gptc.errors import UsageError

if TYPE_CHECKING:
    from gptc.training.run import Summary

_EPILOG = """\b
Examples:
  gptc train                                        the tiny model on the built-in stories
  gptc train --data book.txt --minutes 10           your own text, for ten minutes
  gptc train --preset gpt2 --data data/books --steps 20K
  gptc train --resume runs/tiny-stories --steps 10K
  gptc train --init-from runs/tiny-stories --data shakespeare
"""

_NEWEST = ""  # the value of --resume without one

_FLOAT = click.FLOAT
# Section: rows of (name, type, metavar, help). Values are None unless they are given, so that a
# preset, a TOML file or a stored run can supply them.
_OPTIONS: dict[str, list[tuple[str, Any, str, str]]] = {
    "What to train": [
        (
            "data",
            str,
            "DIR",
            "A folder from gptc prepare, a text file, or a dataset's name: see gptc prepare --help."
            "  [stories]",
        ),
        (
            "tokenizer",
            str,
            "KIND",
            "For data not prepared yet, as in gptc prepare.  [bytes; bpe:2048 for stories but with "
            "preset byte]",
        ),
        (
            "preset",
            str,
            "NAME",
            "Shape and training defaults: tiny, byte, gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
            "llama-15m, llama-42m, llama-110m.  [tiny]",
        ),
        ("out", str, "DIR", "Folder of the run.  [runs/PRESET-DATA]"),
        ("init-from", str, "PATH", "Fine-tune a model: a checkpoint, run, folder or file."),
        ("seed", click.IntRange(min=0), "N", "Of weights, batches, dropout and samples.  [1337]"),
    ],
    "Where": [
        ("device", click.Choice(["auto", "cpu", "cuda"]), "", "[auto]"),
        ("dtype", click.Choice(["auto", "fp32", "bf16"]), "", "bf16 is mixed precision.  [auto]"),
        ("threads", SIZE, "N", "0: one for each core.  [0]"),
    ],
    "How long (the first limit reached ends the run)": [
        ("steps", COUNT, "N", "Optimizer steps in all.  [by preset]"),
        ("tokens", COUNT, "N", "Training tokens in all, such as 10M."),
        ("epochs", _FLOAT, "X", "Passes over the training split."),
        ("minutes", _FLOAT, "X", "Training time; the learning rate falls with it."),
    ],
    "Batches and the optimizer (defaults by preset)": [
        ("batch-size", COUNT, "N", "Sequences in a micro-batch."),
        ("seq-len", COUNT, "N", "Tokens in a sequence; a new model's context."),
        ("grad-accum", COUNT, "N", "Micro-batches in a step."),
        ("lr", _FLOAT, "X", "Peak learning rate."),
        ("min-lr", _FLOAT, "X", "Learning rate of the last step.  [a tenth of --lr]"),
        ("warmup-steps", SIZE, "N", "Steps of linear warm-up."),
        (
            "schedule",
            click.Choice(["cosine", "linear", "wsd", "constant"]),
            "",
            "After the warm-up; wsd falls in the last fifth.  [cosine]",
        ),
        ("weight-decay", _FLOAT, "X", "Of matrices."),
        ("beta1", _FLOAT, "X", "[0.9]"),
        ("beta2", _FLOAT, "X", "[by preset]"),
        ("eps", _FLOAT, "X", "[1e-8]"),
        ("grad-clip", _FLOAT, "X", "Largest gradient norm; 0: any.  [1]"),
        ("dropout", _FLOAT, "X", "[0]"),
        ("optimizer", click.Choice(["adamw"]), "", "[adamw]"),
    ],
    "Reports and checkpoints": [
        ("eval-every", COUNT, "N", "Steps between evaluations.  [by preset]"),
        (
            "eval-batches",
            SIZE,
            "N",
            "Batches of one; 0: all, as in the last one if cheap.  [by preset]",
        ),
        ("sample-every", SIZE, "N", "Steps between samples; 0: only at the end.  [0]"),
        ("save-every", COUNT, "N", "Steps between checkpoints.  [as --eval-every]"),
        ("keep-last", SIZE, "N", "Checkpoints to keep; 0: all.  [2]"),
    ],
    "Changes to the preset's shape": [
        ("n-layer", COUNT, "N", "Layers."),
        ("n-head", COUNT, "N", "Attention heads; divides --n-embd."),
        ("n-kv-head", COUNT, "N", "Key and value heads; divides --n-head."),
        ("n-embd", COUNT, "N", "Width."),
        ("n-ff", COUNT, "N", "Width of the feed-forward layer."),
    ],
}


class SectionedCommand(click.Command):
    """A command whose help shows its options in the sections of the table above."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each heading, then the options that stand in none."""
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        for section, rows in _OPTIONS.items():
            names = [name.replace("-", "_") for name, *_ in rows]
            if "n_ff" in names:
                names.append("bias")
            if "threads" in names:
                names.append("pin")
            with formatter.section(section):
                formatter.write_dl([record for name in names if (record := records.pop(name))])
        with formatter.section("Other options"):
            formatter.write_dl([record for record in records.values() if record])


def _all_options(command: Any) -> Any:
    """Adds the options of the table to a function."""
    for rows in reversed(_OPTIONS.values()):
        for name, kind, metavar, text in reversed(rows):
            extra = {"metavar": metavar} if metavar else {}
            command = click.option(f"--{name}", type=kind, help=text, **extra)(command)
    return command


@click.command("train", cls=SectionedCommand, epilog=_EPILOG)
@_all_options
@click.option("--bias/--no-bias", default=None, help="Biases in linear layers and LayerNorms.")
@click.option("--pin/--no-pin", default=None, help="Keep each thread on one core.  [no]")
@click.option(
    "--resume",
    is_flag=False,
    flag_value=_NEWEST,
    metavar="[RUN]",
    help="Continue a run, exactly; without RUN the newest one under runs/.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file with any of these options; the command line wins.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
@click.pass_context
def train_command(
    ctx: click.Context, /, resume: str | None, config: Path | None, as_json: bool, **values: Any
) -> None:
    """Train a GPT.

    Without options it trains a tiny model on the built-in stories and prints a sample. Ctrl-C
    saves and says how to resume. Sizes take suffixes: 64K, 2M, 1G.
    """
    if resume is not None and values["init_from"] is not None:
        raise UsageError("--resume and --init-from exclude each other: continue, or start anew")
    from gptc.checkpoint.find import find_checkpoint
    from gptc.training.options import read_toml
    from gptc.training.progress import make_progress
    from gptc.training.run import train

    given = {} if config is None else read_toml(config)
    given |= {name: value for name, value in values.items() if value is not None}
    if resume == _NEWEST:
        resume = str(find_checkpoint().parent)
    summary = train(given, resume=resume, progress=make_progress())
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
    else:
        _print_summary(summary)
    if summary.signal is not None:
        ctx.exit(128 + summary.signal)


def _print_summary(summary: Summary) -> None:
    from gptc.files.words import amount, duration
    from gptc.training.progress import say

    if summary.sample is not None:
        say(f"\n{summary.sample}\n", sys.stdout)
    done = f"{summary.step:,} of {summary.steps:,} steps in {duration(summary.elapsed_s)}"
    if summary.val_loss is not None and summary.val_bpb is not None:
        done += f", val loss {summary.val_loss:.4f}, {summary.val_bpb:.3f} bits per byte"
    say(done, sys.stderr)
    if summary.tokens_per_s is not None:
        peak = f"{summary.dtype} peak, {summary.peak_flops / 1e9:,.0f} GFLOP/s"
        mfu = "" if summary.mfu is None else f", {summary.mfu:.0%} of the {peak}"
        memory = (
            f"peak memory {amount(summary.peak_resident_bytes)}, "
            f"{amount(summary.planned_peak_bytes)} planned (engine and resident before)"
        )
        if summary.device != "cpu":
            memory = (
                f"{amount(summary.engine_bytes)} of the GPU's memory, "
                f"{amount(summary.peak_resident_bytes)} of the host's"
            )
        say(f"{summary.tokens_per_s:,.0f} tokens/s{mfu}", sys.stderr)
        say(memory, sys.stderr)
    if summary.checkpoint is None:
        say("stopped before the first step was done, so nothing was saved", sys.stderr)
        return
    if summary.step > summary.first_step:
        say(f"saved {summary.checkpoint}", sys.stderr)
    if summary.step < summary.steps:
        say(f"resume with: gptc train --resume {summary.out}", sys.stderr)
    else:
        say(f'next: gptc infer -m {summary.out} -p "Once upon a time"', sys.stderr)
