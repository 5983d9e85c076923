"""`gptc train`: trains from scratch, resumes a run, or fine-tunes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.declared import SectionedCommand, options_of
from gptc.cli.params import config_option
from gptc.errors import UsageError
from gptc.files.words import quoted
from gptc.settings import read_toml
from gptc.training.options import TrainOptions

if TYPE_CHECKING:
    from gptc.training.report import Summary

_EPILOG = """\b
Examples:
  gptc train                                        the tiny model on the built-in stories
  gptc train --data book.txt --minutes 10           your own text, for ten minutes
  gptc train --preset gpt2 --data data/books --steps 20K
  gptc train --resume runs/tiny-stories --steps 10K
  gptc train --init-from runs/tiny-stories --data shakespeare
"""

_NEWEST = ""  # the value of --resume if it is given without one


class TrainCommand(SectionedCommand):
    """Groups its help by the sections of TrainOptions."""

    declares = (TrainOptions,)


@click.command("train", cls=TrainCommand, epilog=_EPILOG)
@options_of(TrainOptions, unset=True)
@click.option(
    "--resume",
    is_flag=False,
    flag_value=_NEWEST,
    metavar="[RUN]",
    type=click.Path(),
    help="Run to continue, bit for bit.  [the run in --out, else the newest under runs/]",
)
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
@click.pass_context
def train_command(
    ctx: click.Context, /, resume: str | None, config: Path | None, as_json: bool, **values: Any
) -> None:
    """Train a GPT.

    Without options, gptc trains a tiny model on the built-in stories and prints a sample. Ctrl-C
    saves the run and prints how to resume it. Sizes take suffixes: 64K, 2M, 1G.
    """
    if resume is not None and values["init_from"] is not None:
        raise UsageError(
            "--resume and --init-from exclude each other: continue a run, or start a new one"
        )
    from gptc.checkpoint.find import find_checkpoint
    from gptc.engine.world import join
    from gptc.training.progress import make_progress
    from gptc.training.run import train

    def asked_for() -> tuple[dict[str, Any], str | None]:
        given = given_options(config, values)
        newest = resume == _NEWEST
        return given, (given.get("out") or str(find_checkpoint().parent)) if newest else resume

    world = join(values["comm_timeout"])
    given, run = world.together(asked_for)
    summary = train(given, resume=run, progress=None if world.rank else make_progress())
    end(ctx, summary, as_json, quiet=world.rank > 0)


def given_options(config: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """The options of a TOML file and of the command line, which wins; None = not given."""
    from gptc.training.depth import CHOSEN, PRESET
    from gptc.training.options import LIMITS
    from gptc.training.resolve import SETS

    file = {} if config is None else read_toml(TrainOptions, config)
    given = {name: value for name, value in values.items() if value is not None}
    if "depth" in given and file.get("depth"):  # this depth chooses, in place of it
        file = {name: v for name, v in file.items() if name not in (*CHOSEN, *LIMITS)}
        file.pop("warmup_steps", None)
    for pair in SETS:  # either option of the command line replaces the file's other one
        if any(name in given for name in pair):
            file = {name: value for name, value in file.items() if name not in pair}
    depth, preset = given.get("depth", file.get("depth")), file.get("preset", PRESET)
    if depth is not None and "preset" not in given and preset != PRESET:
        raise UsageError(
            f"--depth {depth} chooses the shape of {PRESET}: remove preset = {preset!r} from "
            f"{config}"
        )
    return file | given


def end(ctx: click.Context, summary: Summary, as_json: bool, quiet: bool = False) -> None:
    """Prints the summary of a run, and exits with its signal's code if one has ended it."""
    if quiet:
        pass
    elif as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
    else:
        _print_summary(summary)
    if summary.signal is not None:
        ctx.exit(128 + summary.signal)


def _print_summary(summary: Summary) -> None:
    """Prints a run's sample, figures and next command."""
    from gptc.files.words import amount, duration
    from gptc.training.progress import say

    if summary.sample is not None:
        say(f"\n{summary.sample}\n", sys.stdout)
    done = f"{summary.step:,} of {summary.steps:,} steps in {duration(summary.elapsed_s)}"
    if summary.val_loss is not None:
        done += f", val loss {summary.val_loss:.4f}"
    if summary.val_bpb is not None:
        done += f", {summary.val_bpb:.3f} bits per byte"
    if summary.val_accuracy is not None:
        done += f", accuracy {summary.val_accuracy:.0%}, margin {summary.val_margin:.3f}"
    say(done, sys.stderr)
    if summary.tokens_per_s is not None:
        peak = f"{summary.dtype} peak, {summary.peak_flops / 1e9:,.0f} GFLOP/s"
        mfu = "" if summary.mfu is None else f", {summary.mfu:.0%} of the {peak}"
        memory = (
            f"peak memory {amount(summary.peak_resident_bytes)}, "
            f"{amount(summary.planned_peak_bytes)} planned"
        )
        if summary.device != "cpu":
            memory = (
                f"{amount(summary.engine_bytes)} of the GPU's memory, "
                f"{amount(summary.peak_resident_bytes)} of the host's"
            )
        say(f"{summary.tokens_per_s:,.0f} tokens/s{mfu}", sys.stderr)
        say(memory, sys.stderr)
    if summary.checkpoint is None:
        say("stopped before the end of the first step: nothing is saved", sys.stderr)
        return
    if summary.step > summary.first_step:
        say(f"saved {summary.checkpoint}", sys.stderr)
    if summary.best_checkpoint is not None and summary.best_val_loss is not None:
        say(
            f"best val loss {summary.best_val_loss:.4f} at step {summary.best_step:,}: "
            f"{summary.best_checkpoint}",
            sys.stderr,
        )
    if summary.step < summary.steps and not summary.out_of_patience:
        say(f"resume with: gptc train --resume {quoted(summary.out)}", sys.stderr)
    else:
        model = quoted(summary.best_checkpoint or summary.out)
        prompt = " --chat" if summary.chats else f" -p {quoted(summary.prompt)}"
        say(f"next: gptc infer -m {model}{prompt}", sys.stderr)
