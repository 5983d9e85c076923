"""`gptc bench`: how fast this machine trains, alone or beside PyTorch."""

from __future__ import annotations

import json
from typing import Any

import click

from gptc.cli.params import COUNT, SIZE

_EPILOG = """\b
Examples:
  gptc bench train                                  GPT-2 124M, 4 x 256 tokens
  gptc bench train --against torch                  beside PyTorch in fp32, turn by turn
  gptc bench train --preset tiny --batch-size 8 --seq-len 128 --json
"""


@click.group("bench", epilog="\b\nExamples:\n  gptc bench train --against torch")
def bench_command() -> None:
    """Measure speed."""


@bench_command.command("train", epilog=_EPILOG)
@click.option("--preset", default="gpt2", show_default=True, metavar="NAME", help="Model shape.")
@click.option("--batch-size", type=COUNT, default=4, show_default=True, metavar="N")
@click.option("--seq-len", type=COUNT, default=256, show_default=True, metavar="N")
@click.option("--vocab-size", type=COUNT, metavar="N", help="Vocabulary.  [by preset]")
@click.option("--n-layer", type=COUNT, metavar="N", help="Layers.  [by preset]")
@click.option("--n-head", type=COUNT, metavar="N", help="Attention heads.  [by preset]")
@click.option("--n-embd", type=COUNT, metavar="N", help="Width.  [by preset]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="cpu")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@click.option("--threads", type=SIZE, default=0, metavar="N", help="0: one for each core.")
@click.option("--turns", type=COUNT, default=5, show_default=True, metavar="N")
@click.option("--steps", type=COUNT, default=2, show_default=True, help="Steps in a turn.")
@click.option(
    "--against",
    type=click.Choice(["torch", "torch-all"]),
    help="Beside PyTorch: fp32, or all of fp32, bf16 autocast, and both compiled.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench_train_command(
    preset: str,
    batch_size: int,
    seq_len: int,
    vocab_size: int | None,
    n_layer: int | None,
    n_head: int | None,
    n_embd: int | None,
    device: str,
    dtype: str,
    threads: int,
    turns: int,
    steps: int,
    against: str | None,
    as_json: bool,
) -> None:
    """Time training steps on random tokens: median over turns, and ratios turn by turn."""
    from gptc import bench
    from gptc.config import GPTConfig
    from gptc.model import Options

    changes: dict[str, Any] = {
        "block_size": seq_len,
        "vocab_size": vocab_size,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
    }
    config = GPTConfig.preset(preset, **{k: v for k, v in changes.items() if v is not None})
    variants = {
        None: (),
        "torch": bench.TORCH_VARIANTS[:1],
        "torch-all": bench.TORCH_VARIANTS,
    }[against]
    result = bench.bench_train(
        config,
        Options(device, dtype, threads, max_batch=batch_size, max_seq=seq_len),
        turns=turns,
        steps=steps,
        against=variants,
        report=lambda text: click.echo(text, err=True) if not as_json else None,
    )
    click.echo(json.dumps(result, indent=2) if as_json else bench.table(result))
