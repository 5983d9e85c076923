"""`gptc plot`: pictures of training runs."""

from __future__ import annotations

from pathlib import Path

import click

from gptc.cli.command import Command

_EPILOG = """\b
Examples:
  gptc plot runs/tiny-stories                       to runs/tiny-stories/curves.png
  gptc plot runs/a runs/b --out compare.html        one page: curves, results, options that differ
  gptc plot runs/a runs/b --x time
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
def plot_command(runs: tuple[Path, ...], out: Path | None, x: str) -> None:
    """Draw the curves of runs: loss, bits per byte, learning rate, gradient norm and speed.

    Without RUN, the newest run. Needs the package matplotlib.
    """
    from gptc.checkpoint.find import find_checkpoint
    from gptc.training.curves import read_curves
    from gptc.training.plot import draw

    folders = runs or (find_checkpoint().parent,)
    out = out or folders[0] / "curves.png"
    draw([read_curves(folder) for folder in folders], out, x)
    click.echo(f"wrote {out}")
