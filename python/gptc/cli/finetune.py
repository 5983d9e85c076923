"""`gptc finetune`: trains a model further on conversations, with defaults that work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptc.cli.declared import SectionedCommand, options_of
from gptc.cli.params import config_option
from gptc.cli.train import end, given_options
from gptc.errors import UsageError
from gptc.files.words import quoted
from gptc.settings import declared
from gptc.training.defaults import DPO_LR, FULL_DPO_LR, FULL_LR, defaults_for
from gptc.training.options import LIMITS, SHAPE, TrainOptions
from gptc.training.step_options import STEP

_EPILOG = """\b
Examples:
  gptc finetune -m runs/tiny-stories --data chats.jsonl
  gptc finetune -m SmolLM2-135M-Instruct --data chats.jsonl --epochs 2 --lr 1e-4
  gptc finetune -m model.gguf --data chats.parquet --train-on completion --on-bad-row skip
  gptc finetune -m runs/people --data pairs.jsonl --dpo
"""
_ABSENT = ("data", "init_from", "preset", "depth", *SHAPE)  # options of gptc train that it has not


def _one_file(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> str:
    """The data. UsageError for several files: click would silently take the last."""
    if len(given) > 1:
        files, model = " ".join(map(quoted, given)), quoted(ctx.params.get("model") or "MODEL")
        raise UsageError(
            "--data is given twice: make one dataset of the files and give its folder: "
            f"gptc prepare {files} --tokenizer {model} --out DIR"
        )
    return given[0]


class FinetuneCommand(SectionedCommand):
    """Groups its help by the sections of TrainOptions."""

    declares = (TrainOptions,)
    homes = {"model": TrainOptions.SECTIONS[0]}  # noqa: RUF012
    titles = {STEP: "Batches and optimizer"}  # noqa: RUF012


def _power(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-")


def _shown() -> dict[str, str]:
    """The defaults in the help, where they are not those of gptc train."""
    table = defaults_for("init-from") | defaults_for("finetune")
    texts = {
        name: f"{value:g}" if isinstance(value, float | int) else str(value)
        for name, option in declared(TrainOptions).items()
        if option.shown == "by preset" or name in table
        for value in [table.get(name, option.default)]
    }
    return texts | {
        "tokenizer": "the model's",
        "out": "runs/MODEL-DATA",
        "steps": "as --epochs",
        "epochs": f"{table['epochs']:g}, unless another limit is given",
        "warmup_steps": f"{defaults_for('init-from')['warmup_steps']}, at most a tenth of them",
        "lora_rank": f"{table['lora_rank']}; 0 on a GPU that --device auto chooses",
        "lr": f"{_power(table['lr'])}, with --dpo {_power(DPO_LR)}; without adapters "
        f"{_power(FULL_LR)} and {_power(FULL_DPO_LR)}",
    }


@click.command("finetune", cls=FinetuneCommand, epilog=_EPILOG)
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="PATH",
    type=click.Path(),
    help="Model to fine-tune: a checkpoint, run, folder or file.",
)
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    type=click.Path(),
    multiple=True,
    callback=_one_file,
    help="Rows of conversations (.jsonl, .json, .csv, .tsv, .parquet), or the folder of a dataset.",
)
@options_of(TrainOptions, without=_ABSENT, defaults=_shown(), unset=True)
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
@click.pass_context
def finetune_command(
    ctx: click.Context,
    /,
    model: str,
    data: str,
    config: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Fine-tune a model on chat or instruction data.

    Rows have `messages`, `prompt` and `completion`, `instruction`, `input` and `output`, or
    ShareGPT's `conversations`. Only the answers are learned, by adapters of rank 16 (--lora-rank 0:
    by all parameters) at a learning rate of 2e-4 (2e-5), in three epochs unless a limit is given. A
    tenth of the rows is held out; the model answers three of their prompts before and after. With
    --dpo, rows have `prompt`, `chosen` and `rejected`, and the learning rate is 1e-5 (1e-6).
    """
    from gptc.data.chat_cache import check_rows, is_texts
    from gptc.engine.world import join
    from gptc.training.progress import make_progress
    from gptc.training.run import train

    def asked_for() -> dict[str, Any]:
        given = given_options(config, values)
        if wrong := [name for name in _ABSENT if name in given]:
            raise UsageError(
                f"{config} sets {wrong[0]}, which gptc finetune takes from -m and --data"
            )
        check_rows(data)
        return {**finetune_options(given), "init_from": model, "data": data}

    world = join(values["comm_timeout"])
    options = world.together(asked_for)
    progress = None if world.rank else make_progress()
    if progress is not None and is_texts(data):
        progress.note(
            f"note: {data} has texts and no conversations: every token is learned, without a chat "
            "template"
        )
    summary = train(options, progress=progress)
    end(ctx, summary, as_json, quiet=world.rank > 0)


def finetune_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that are given, with the defaults of `gptc finetune`.

    Adapters are trained, but all parameters on a GPU that "auto" chooses.
    """
    from gptc.engine.options import Options

    table = defaults_for("finetune")
    options = {name: table[name] for name in table if name not in ("steps", "warmup_steps")}
    if any(given.get(name) is not None for name in LIMITS):
        del options["epochs"]
    device = given.get("device", "auto")
    if device == "auto" and Options(device).resolved().device != "cpu":
        options["lora_rank"] = 0
    full = not given.get("lora_rank", options["lora_rank"])
    if given.get("dpo"):
        options["lr"] = FULL_DPO_LR if full else DPO_LR
    elif full:
        options["lr"] = FULL_LR
    return options | given
