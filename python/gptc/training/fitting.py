"""Advice for a run that does not fit into memory: options with which it does."""

from __future__ import annotations

from dataclasses import replace

from gptc.engine.config import GPTConfig, presets
from gptc.engine.options import Options, plan_for
from gptc.files.words import amount
from gptc.training.defaults import defaults_for
from gptc.training.options import SHAPE, TrainOptions


def what_fits(
    options: TrainOptions, config: GPTConfig, settings: Options, available: int, resumed: bool
) -> str:
    """What to change so that the run's plan is at most `available` bytes."""

    def needed(config: GPTConfig, batch_size: int, seq_len: int) -> int:
        rows = batch_size * options.rows // options.batch_size
        sized = replace(settings, max_batch=rows, max_seq=seq_len)
        return plan_for(config, sized).total_bytes

    def fits(config: GPTConfig, batch_size: int, seq_len: int) -> bool:
        return needed(config, batch_size, seq_len) <= available

    batch_size, seq_len = options.batch_size, options.seq_len
    while batch_size > 1:
        batch_size //= 2
        if fits(config, batch_size, seq_len):
            return f"use --batch-size {batch_size} (now {options.batch_size})"
    if resumed:  # neither the length of sequences nor the model can change
        return "free memory, or resume on a machine with more"
    is_new = options.init_from is None
    while seq_len > 1:
        seq_len //= 2
        shorter = replace(config, block_size=seq_len) if is_new else config
        if fits(shorter, 1, seq_len):
            return f"use --batch-size 1 --seq-len {seq_len} (now {options.seq_len})"
    if not is_new:
        return "its weights alone are too large: fine-tune a smaller model"
    if any(getattr(options, name) is not None for name in SHAPE):
        return "its weights alone are too large: use a smaller --n-layer or --n-embd"
    shapes = _by_size(config.vocab_size, options.seq_len)
    for preset, smaller in shapes:
        # Sizes that were given stay, others are the preset's.
        if all(
            fits(replace(smaller, block_size=seq_len), batch_size, seq_len)
            for batch_size, seq_len in (_sizes(preset), (options.batch_size, options.seq_len))
        ):
            return f"its weights alone are too large: use --preset {preset}"
    preset, smallest = shapes[-1]
    usual = seq_len = _sizes(preset)[1]
    sized = f"--preset {preset} --batch-size 1 --seq-len "
    while seq_len > 1:
        seq_len //= 2
        if fits(replace(smallest, block_size=seq_len), 1, seq_len):
            return f"its weights alone are too large: use {sized}{seq_len}"
    least = needed(replace(smallest, block_size=usual), 1, usual)
    return (
        "the weights of every preset are too large: free memory, "
        f"{amount(least)} for {sized}{usual}"
    )


def _sizes(preset: str) -> tuple[int, int]:
    """The batch size and the length of sequences that a preset has by default."""
    table = defaults_for(preset)
    return (
        table.get("batch_size", TrainOptions.batch_size),
        table.get("seq_len", TrainOptions.seq_len),
    )


def _by_size(vocab_size: int, block_size: int) -> list[tuple[str, GPTConfig]]:
    """The presets, largest first."""
    shapes = [
        (name, GPTConfig.preset(name, vocab_size=vocab_size, block_size=block_size))
        for name in presets()
    ]
    return sorted(shapes, key=lambda item: -plan_for(item[1], Options("cpu")).n_params)
