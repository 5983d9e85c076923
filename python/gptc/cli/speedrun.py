"""`gptc speedrun`: the time to a loss on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gptc.cli.declared import SectionedCommand, options_of
from gptc.cli.params import FiniteNumber, SizeParam
from gptc.training.options import LIMITS, SHAPE, TrainOptions

_EPILOG = """\b
Examples:
  gptc speedrun shakespeare-char                       time to a loss of 1.88, median of five seeds
  gptc speedrun stories --minutes 1 --seeds 1          bits per byte after a minute
  gptc speedrun shakespeare-char --data input.txt --preset llama-15m --steps 1400
"""


class SpeedrunCommand(SectionedCommand):
    """Groups its help by the sections of TrainOptions, after its own options."""

    declares = (TrainOptions,)
    rest = "Speedrun"
    rest_first = True


@click.command("speedrun", cls=SpeedrunCommand, epilog=_EPILOG)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--target",
    type=FiniteNumber(min=0, min_open=True),
    metavar="X",
    help="Result to reach: loss, or bits per byte of stories.  [by recipe]",
)
@click.option(
    "--seeds",
    type=SizeParam(min=1, max=1000),
    default=5,
    metavar="N",
    help="Number of runs, at most 1,000.  [5]",
)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the runs; it must not hold any.  [runs/speedrun-RECIPE-TIME]",
)
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("runs/speedruns.jsonl"),
    metavar="FILE",
    help="Table to add a line of JSON to.  [runs/speedruns.jsonl]",
)
@options_of(TrainOptions, without=("seed", "out", "eval_every", "eval_batches"), unset=True)
def speedrun_command(
    recipe: str,
    target: float | None,
    seeds: int,
    runs: Path | None,
    table: Path,
    **values: Any,
) -> int:
    """Train a recipe, shakespeare-char or stories, and time the whole process.

    Options of gptc train replace the recipe's; a limit its limits, a preset its shape, and a depth
    both. A target that is out of reach by the scaling rule is an error before any run. Exits with 1
    if the median result misses the target.
    """
    from gptc.engine.launch import launched
    from gptc.training.depth import CHOSEN
    from gptc.training.expected import check_target
    from gptc.training.speedrun import RECIPES, Attempt, Race, append, machine, run_attempts

    if launched():
        raise click.UsageError("gptc speedrun times one process: start it without mpirun or srun")
    if recipe not in RECIPES:
        raise click.UsageError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    known = RECIPES[recipe]
    given = {name: value for name, value in values.items() if value is not None}
    own = dict(known.options)
    replaces = (
        (LIMITS, LIMITS),
        (("preset",), (*SHAPE, "momentum_warmup")),
        (("depth",), (*CHOSEN, *LIMITS, "warmup_steps", "momentum_warmup")),
    )
    for causes, replaced in replaces:
        if given.keys() & set(causes):
            own = {name: value for name, value in own.items() if name not in replaced}
    race = Race(recipe, known.measure, target or known.target, {**own, **given}, [], machine())
    folder = runs or Path(f"runs/speedrun-{recipe}-{race.time.replace(':', '')}")
    check_target(known.rule, given, race.options, race.target, folder)
    attempts: list[Attempt] = []
    for attempt in run_attempts(race.options, race.measure, seeds, folder):
        attempts.append(attempt)
        click.echo(
            f"seed {attempt.seed}  {race.measure} {attempt.value:.4f}  {attempt.seconds:.2f} s  "
            f"{attempt.cpu_seconds:.2f} CPU s  {attempt.steps:,} steps  load {attempt.load:.1f}"
        )
    race = replace(race, attempts=attempts)
    append(table, race)
    reached = "reached" if race.is_reached else "missed"
    goal = "" if race.target is None else f"target {race.target:g} {reached}, "
    click.echo(
        f"{recipe}: median {race.median.seconds:.2f} s, {race.measure} {race.median_value:.4f}, "
        f"{goal}{race.machine['cpu']}, {race.machine['cores']} cores, {race.machine['cpu_level']}"
    )
    return 0 if race.is_reached else 1
