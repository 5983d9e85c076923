"""`gptc plot`: pictures of training runs."""

from __future__ import annotations

from pathlib import Path

import click

from gptc.cli.command import Command
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
    type=click.IntRange(0, 1000),
    default=5,
    metavar="N",
    help="Order of the n-grams that a page compares with; 0 = none.  [5]",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard event files of each run.")
@click.option("--wandb", is_flag=True, help="Send the runs to Weights & Biases.")
@click.option("--trackio", is_flag=True, help="Send the runs to Trackio.")
def plot_command(
    runs: tuple[Path, ...], out: Path | None, x: str, ngram: int, **trackers: bool
) -> None:
    """Draw the curves of runs: loss, learning rate, gradient norm, speed, size of updates.

    Without RUN, the newest run. A page of HTML also has results, samples, the options that differ,
    and the gain over n-grams counted in a run's data. Needs the package matplotlib.
    """
    from gptc.checkpoint.find import find_checkpoint
    from gptc.training.curves import read_curves
    from gptc.training.plot import PAGE, draw
    from gptc.training.trackers import find_package, replay
    from gptc.training.yardstick import gain_of

    def show(line: str) -> None:
        click.echo(line, err=True)

    folders = runs or (find_checkpoint().parent,)
    out = out or folders[0] / "curves.png"
    for name, chosen in trackers.items():
        if chosen:
            find_package(name)
    curves, gains = [read_curves(folder) for folder in folders], {}
    for run in curves if ngram and out.suffix.lower() == PAGE else ():
        try:
            gains[run.folder] = gain_of(run, ngram)
        except GptcError as error:
            show(f"note: no comparison with n-grams: {error}")
    draw(curves, out, x, gains)
    for run in curves:
        replay(run, [name for name, chosen in trackers.items() if chosen], show)
    click.echo(f"wrote {out}")
