"""`gptc bench`: how fast this machine trains, alone or against PyTorch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable

import click

from gptc.cli.command import Command
from gptc.cli.complete import complete
from gptc.cli.declared import options_of
from gptc.cli.params import COUNT, FiniteNumber
from gptc.engine.config import GPTConfig
from gptc.engine.options import CacheOptions, DeviceOptions

_EPILOG = """\b
Examples:
  gptc bench train                                  GPT-2 124M, 4 x 256 tokens
  gptc bench train --against torch                  against PyTorch in fp32, turn by turn
  gptc bench train --preset tiny --batch-size 8 --seq-len 128 --json
"""


_EPILOG_OPS = """\b
Examples:
  gptc bench ops                                    GPT-2 124M, 4 x 256 tokens
  gptc bench ops --against torch                    against its products of the same shapes
  gptc bench ops --dtype fp32 --n-layer 4 --n-embd 128 --n-head 4 --vocab-size 65
"""

_preset = click.option(
    "--preset",
    default="gpt2",
    show_default=True,
    metavar="NAME",
    help="Shape.",
    shell_complete=complete,
)
_OPTIONS = [
    _preset,
    click.option("--batch-size", type=COUNT, default=4, show_default=True, metavar="N"),
    click.option("--seq-len", type=COUNT, default=256, show_default=True, metavar="N"),
    click.option("--vocab-size", type=COUNT, metavar="N", help="Vocabulary.  [by preset]"),
    click.option("--n-layer", type=COUNT, metavar="N", help="Layers.  [by preset]"),
    click.option("--n-head", type=COUNT, metavar="N", help="Attention heads.  [by preset]"),
    click.option("--n-embd", type=COUNT, metavar="N", help="Width.  [by preset]"),
    options_of(DeviceOptions, without=("pin",)),
]


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what is to be measured."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _config(preset: str, seq_len: int, **changes: int | None) -> GPTConfig:
    given = {name: value for name, value in changes.items() if value is not None}
    return GPTConfig.preset(preset, block_size=seq_len, **given)


_EPILOG_GROUP = """\b
Examples:
  gptc bench train --preset tiny
  gptc bench infer --dtype int8
  gptc bench train --against torch                  needs PyTorch
"""


class BenchGroup(click.Group):
    """Makes its commands as those of `gptc` are."""

    command_class = Command


@click.group("bench", cls=BenchGroup, epilog=_EPILOG_GROUP, invoke_without_command=True)
@click.pass_context
def bench_command(ctx: click.Context) -> None:
    """Measure how fast training and writing are on this machine."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


@bench_command.command("ops", epilog=_EPILOG_OPS, short_help="Time every layer of a step.")
@_with_options
@click.option("--steps", type=COUNT, default=5, show_default=True, help="Steps to take.")
@click.option(
    "--against", type=click.Choice(["torch"]), help="PyTorch's products of the same shapes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench_ops_command(
    preset: str,
    batch_size: int,
    seq_len: int,
    device: str,
    dtype: str,
    threads: int,
    steps: int,
    against: str | None,
    as_json: bool,
    **shape: int | None,
) -> None:
    """Time every layer of training steps: its rate, and its share of the machine's peak."""
    from gptc.bench.ops import bench_ops, table
    from gptc.engine.options import Options

    options = Options(device, dtype, threads, max_batch=batch_size, max_seq=seq_len)
    result = bench_ops(
        _config(preset, seq_len, **shape), options, steps=steps, against_torch=against is not None
    )
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


@bench_command.command("train", epilog=_EPILOG, short_help="Time training steps.")
@_with_options
@click.option("--turns", type=COUNT, default=5, show_default=True, metavar="N")
@click.option("--steps", type=COUNT, default=2, show_default=True, help="Steps in a turn.")
@click.option(
    "--against",
    type=click.Choice(["torch", "torch-bf16", "torch-all"]),
    help="PyTorch in fp32; in bf16 autocast, also compiled; or in all four ways.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench_train_command(
    preset: str,
    batch_size: int,
    seq_len: int,
    device: str,
    dtype: str,
    threads: int,
    turns: int,
    steps: int,
    against: str | None,
    as_json: bool,
    **shape: int | None,
) -> None:
    """Time training steps on random tokens: median over turns, and ratios turn by turn."""
    from gptc.bench import train as bench
    from gptc.engine.options import Options

    variants = {
        None: (),
        "torch": bench.TORCH_VARIANTS[:1],
        "torch-bf16": tuple(name for name in bench.TORCH_VARIANTS if "bf16" in name),
        "torch-all": bench.TORCH_VARIANTS,
    }[against]
    result = bench.bench_train(
        _config(preset, seq_len, **shape),
        Options(device, dtype, threads, max_batch=batch_size, max_seq=seq_len),
        turns=turns,
        steps=steps,
        against=variants,
        report=lambda text: click.echo(text, err=True) if not as_json else None,
    )
    click.echo(json.dumps(result, indent=2) if as_json else bench.table(result))


_EPILOG_INFER = """\b
Examples:
  gptc bench infer                                  GPT-2 124M, in every dtype
  gptc bench infer --against llama.cpp --against transformers
  gptc bench infer -m model.gguf --against openvino
  gptc bench infer --preset llama-15m --dtype int8 --json
"""


@bench_command.command("infer", epilog=_EPILOG_INFER, short_help="Time decoding and prompts.")
@_preset
@click.option("-m", "--model", metavar="PATH", help="Model to time.  [a random one of --preset]")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["fp32", "bf16", "int8", "int4"]),
    help="May be repeated.  [all]",
)
@options_of(DeviceOptions, only=("threads",))
@options_of(CacheOptions)
@click.option("--turns", type=COUNT, default=5, show_default=True, metavar="N")
@click.option("--prompt-tokens", type=COUNT, default=512, show_default=True, metavar="N")
@click.option(
    "--batch", "batches", type=COUNT, multiple=True, metavar="N",
    help="Sequences decoded at once; may be repeated.  [1 and 16]",
)  # fmt: skip
@click.option(
    "--against",
    multiple=True,
    type=click.Choice(["llama.cpp", "transformers", "ctranslate2", "openvino", "onnxruntime"]),
    help="Rival with the same weights. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench_infer_command(
    preset: str,
    model: str | None,
    dtypes: tuple[str, ...],
    threads: int,
    kv_dtype: str,
    turns: int,
    prompt_tokens: int,
    batches: tuple[int, ...],
    against: tuple[str, ...],
    as_json: bool,
) -> None:
    """Time decoding and prompts of a model on the CPU, turn by turn."""
    from gptc.bench import infer as bench_infer

    result = bench_infer.bench_infer(
        model or GPTConfig.preset(preset),
        dtypes or ("fp32", "bf16", "int8", "int4"),
        against=against,
        threads=threads,
        kv_dtype=kv_dtype,
        turns=turns,
        n_prompt=prompt_tokens,
        batches=batches or bench_infer.BATCHES,
        report=lambda text: click.echo(text, err=True) if not as_json else None,
    )
    click.echo(json.dumps(result, indent=2) if as_json else bench_infer.table(result))


_EPILOG_SERVE = """\b
Examples:
  gptc bench serve --against http://127.0.0.1:8000
  gptc bench serve --against http://127.0.0.1:8000 --clients 16 --prompt-words 800
"""


@bench_command.command("serve", epilog=_EPILOG_SERVE, short_help="Time a server's answers.")
@click.option("--against", required=True, metavar="URL", help="Address of the server.")
@click.option(
    "--clients", type=COUNT, multiple=True, metavar="N",
    help="Clients at once; may be repeated.  [1, 4, 16 and 64]",
)  # fmt: skip
@click.option("--requests", type=COUNT, default=2, show_default=True, help="Of each client.")
@click.option("--prompt-words", type=COUNT, default=100, show_default=True, metavar="N")
@click.option("--max-tokens", type=COUNT, default=64, show_default=True, metavar="N")
@click.option(
    "--seconds", type=FiniteNumber(min=0), metavar="X",
    help="Time after which clients begin no further request.  [no limit]",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="Name of the model, if the server needs it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench_serve_command(
    against: str,
    clients: tuple[int, ...],
    requests: int,
    prompt_words: int,
    max_tokens: int,
    seconds: float | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Time a server of OpenAI's kind: tokens a second, and the times of pieces.

    A key is read from the variable OPENAI_API_KEY.
    """
    from dataclasses import asdict

    from gptc.bench import serve

    rows = serve.bench_serve(
        against,
        clients=clients or serve.CLIENTS,
        requests=requests,
        prompt_words=prompt_words,
        max_tokens=max_tokens,
        seconds=math.inf if seconds is None else seconds,
        model=model,
        key=os.environ.get("OPENAI_API_KEY"),
        report=lambda text: click.echo(text, err=True) if not as_json else None,
    )
    click.echo(
        json.dumps([asdict(row) for row in rows], indent=2) if as_json else serve.table(rows)
    )
