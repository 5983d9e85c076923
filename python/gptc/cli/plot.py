"""`gptc plot`: pictures of training runs."""

from __future__ import annotations

from pathlib import Path

import click

from gptc.cli.command import Command
from gptc.cli.params import SizeParam
from gptc.errors import GptcError

_EPILOG = """\b
Examples:
  gptc plot runs/tiny-stories                       to runs/tiny-stories/curves.png
  gptc plot runs/a runs/b --out compare.html        one page: curves, results, options that differ
  gptc plot runs/a runs/b --x time
  gptc plot runs/tiny-stories --tensorboard         also event files, in its folder tensorboard
"""


@click.command("plot", cls=Command, epilog=_EPILOG)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN]…")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File to write: .png, .svg, .pdf or .html.  [curves.png in the first run]",
)
@click.option(
    "--x",
    type=click.Choice(["step", "tokens", "time"]),
    default="step",
    help="Horizontal axis.  [step]",
)
@click.option(
    "--ngram",
    type=SizeParam(max=1000),
    metavar="N",
    help="Order of the n-grams that a page compares with; 0 = none.  [5, of the first 1M tokens]",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard event files of each run.")
@click.option("--wandb", is_flag=True, help="Send the runs to Weights & Biases.")
@click.option("--trackio", is_flag=True, help="Send the runs to Trackio.")
def plot_command(
    runs: tuple[Path, ...], out: Path | None, x: str, ngram: int | None, **trackers: bool
) -> None:
    """Draw the curves of runs: loss, learning rate, gradient norm, speed, size of updates.

    Without RUN, the newest run. A page of HTML also has results, samples, the options that differ,
    and the gain over n-grams counted in a run's data. Needs the package matplotlib.
    """
    from gptc.checkpoint.find import find_checkpoint
    from gptc.training.curves import read_curves
    from gptc.training.plot import PAGE, check_out, draw
    from gptc.training.trackers import check_replay, find_package, replay
    from gptc.training.yardstick import UNASKED_ORDER, UNASKED_TOKENS, gain_of

    def show(line: str) -> None:
        click.echo(line, err=True)

    folders = runs or (find_checkpoint().parent,)
    out = out or folders[0] / "curves.png"
    names = [name for name, chosen in trackers.items() if chosen]
    for name in names:
        find_package(name)
    curves, gains = [read_curves(folder) for folder in folders], {}
    for run in curves:
        check_replay(run, names)
    order, most = (UNASKED_ORDER, UNASKED_TOKENS) if ngram is None else (ngram, None)
    for run in curves if check_out(out) == PAGE and order else ():
        try:
            gains[run.folder] = gain_of(run, order, most)
        except GptcError as error:
            show(f"note: no comparison with n-grams: {error}")
    draw(curves, out, x, gains)
    told = [f"wrote {out}"]
    for run in curves:
        for name in replay(run, names, show):
            is_folder = name == "tensorboard"
            told.append(f"wrote {run.folder / name}" if is_folder else f"sent {run.name} to {name}")
    click.echo("\n".join(told))
