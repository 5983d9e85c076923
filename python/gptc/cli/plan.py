"""`gptc plan`: the memory, arithmetic and time of a training run, before it starts."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gptc.cli.declared import SectionedCommand, options_of
from gptc.cli.params import COUNT, config_option
from gptc.cli.train import given_options
from gptc.training.options import TrainOptions

_EPILOG = """\b
Examples:
  gptc plan                                         the run of gptc train
  gptc plan --preset gpt2 --data data/books --tokens-per-step 64K
  gptc plan --preset gpt2 --ranks 4 --link 10G --latency 30
  gptc plan --data data/books --find-lr rates.png   the loss while the learning rate rises
  gptc plan --config runs/tiny-book/config.toml --steps 20K --json
"""


class PlanCommand(SectionedCommand):
    """Groups its help by the sections of TrainOptions."""

    declares = (TrainOptions,)


@click.command("plan", cls=PlanCommand, epilog=_EPILOG)
@options_of(TrainOptions, unset=True)
@config_option
@click.option("--ranks", type=COUNT, metavar="N", help="Number of ranks: the memory of each.  [1]")
@click.option(
    "--link",
    type=click.Choice(["100M", "1G", "10G", "100G", "nvlink"]),
    help="Network between ranks: 1, 10 or 100 Gbit/s, or NVLink of 450 GB/s. Adds the time of a "
    "step, by a formula.",
)
@click.option(
    "--latency", type=float, metavar="US", help="Latency of a message, with --link.  [50]"
)
@click.option(
    "--find-lr",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Picture (.png, .svg, .pdf) of the loss in 120 steps whose learning rate rises.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan_command(
    config: Path | None,
    ranks: int | None,
    link: str | None,
    latency: float | None,
    find_lr: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Print the plan of a training run: parameters, FLOPs, memory, time.

    Takes the options of gptc train. Data that is not prepared yet is prepared. A few seconds of
    training, which are discarded, give the time. With --find-lr, 120 more steps give the range of
    learning rates. With --ranks, also the memory of each rank; with --link, the time of their
    steps.
    """
    from gptc.checkpoint.names import ROOT
    from gptc.engine.options import check_device
    from gptc.files.process import age_s
    from gptc.training import cluster
    from gptc.training.folder import default_name
    from gptc.training.horizon import few_rows
    from gptc.training.lr_range import check_range, draw_range, find_range
    from gptc.training.parallel import check_ranks, check_sequences, without_effect
    from gptc.training.plan import described, forecast
    from gptc.training.progress import PlainProgress
    from gptc.training.report import header
    from gptc.training.resolve import new_options
    from gptc.training.setup import set_up
    from gptc.training.trainer import Trainer

    cluster.check_link(link, latency, ranks)
    options, show = new_options(given_options(config, values)), PlainProgress()
    check_ranks(options, ranks or 1)
    for note in without_effect(options, ranks or 1):
        show.note(note)
    check_device(options.device)  # before data is prepared
    before_s = age_s()
    rates = None
    if find_lr is not None:
        check_range(options, find_lr)
        with closing(set_up(options, None, show)) as setup:
            rates = find_range(setup)
        draw_range(rates, find_lr)
    with closing(set_up(options, None, show)) as setup:
        if ranks:
            check_sequences(setup.options, ranks)
        folder = Path(options.out or ROOT / default_name(setup.options))
        trainer = Trainer(setup, show, folder)
        n_rows = few_rows(setup.loader, setup.plan, setup.peak_flops)
        if n_rows < setup.loader.batch_size:
            show.note(f"a pass is long here: timing {n_rows} of its {setup.loader.batch_size} rows")
        found = forecast(setup, trainer, folder, before_s)
        lines = list(header(setup, trainer.sample_bytes()))  # with the steps that it has found
        latency = cluster.LATENCY_US if latency is None else latency
        several = cluster.predict(setup, found.costs, ranks, link, latency) if ranks else None
    if as_json:
        more = {"cluster": asdict(several)} if several else {}
        more |= {"lr_range": asdict(rates)} if rates else {}
        click.echo(json.dumps({**asdict(found), **more}, indent=2))
        return
    for line in (*lines, *described(found)):
        click.echo(line)
    if rates:
        click.echo(f"{rates} ({find_lr})")
    for line in cluster.described(several, link, options.sync_every) if several else ():
        click.echo(line)
