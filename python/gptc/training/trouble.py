"""A step whose gradients are not finite: the first such tensor, and the batches for replay."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptc.data.loader import Rows
from gptc.engine.model import Model, NotFinite
from gptc.engine.world import World
from gptc.files.whole import write_file
from gptc.files.words import quoted
from gptc.training.options import TrainOptions
from gptc.training.state import State

MOST_SKIPPED = 10  # steps' batches in a row: more are not the data's fault
MOST_ROLLBACKS = 3  # to one checkpoint: its weights may be the cause


class Diverged(Exception):
    """A step without a finite loss; the message says what was not finite, and names the batches."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def first_output(found: NotFinite) -> str:
    """The output of an op that was not finite, in words."""
    layer = "" if found.layer is None else f" in layer {found.layer}"
    return f"{found.tensor}[{found.at}] of {found.op}{layer} is {found.value:g}, the first"


def first_bad(model: Model, world: World | None = None) -> str:
    """The first tensor with numbers that are not finite: of weights, of ops, else of gradients.

    Outputs of ops are known with --debug-nans. Gradients are in the order of the backward pass, so
    that the first one made the others bad. All ranks of a `world` call this and have one answer:
    the earliest tensor, of the first rank that has it.
    """
    world = world or World()
    every = world.gather_json(_own_first_bad(model))
    rank = min(range(world.size), key=lambda r: (every[r][0], r))
    text = str(every[rank][1])
    shared = all(found[1] == text for found in every)  # such as weights, and sums of gradients
    return text if shared else f"{text}, of {world.named(rank)}"


def _own_first_bad(model: Model) -> tuple[tuple[int, int], str]:
    """The first bad tensor of this rank, and its place in the order of a step."""
    for parameter in model.trained:
        if not np.isfinite(model.get(parameter.name)).all():
            return (0, 0), f"{parameter.name} itself is not finite"
    found = model.not_finite()
    # The norm is taken of the sums over ranks, and is bad if any gradient is.
    if found is not None and found.op != "grad_norm":
        return (1, 0), first_output(found)
    for i, parameter in enumerate(reversed(model.trained)):
        if not np.isfinite(model.read(parameter.name, "grad")).all():
            return (2, i), f"the gradient of {parameter.name} was the first"
    return (3, 0), "each gradient is finite, but not their norm"


def advised(trouble: Diverged, state: State, options: TrainOptions) -> str:
    """The error that ends a run, with what to do."""
    lr = f"{options.lr / 3:.2g}"
    if options.min_lr is not None and options.min_lr > float(lr):
        lr += f" --min-lr {options.min_lr / 3:.2g}"
    advice = (
        f"the last checkpoint is {state.saved}; continue from it with "
        f"gptc train --resume {quoted(state.saved.parent)} --lr {lr}"
        if state.saved
        else f"try a smaller --lr than {options.lr:g} or more --warmup-steps"
    )
    return f"the loss is not finite at step {trouble.step} ({trouble}); {advice}"


def save_batches(folder: Path, step: int, batches: Sequence[Rows], skipped: int = 0) -> Path:
    """Writes the micro-batches of a step: inputs and targets (n, B, T), and positions if any.

    `skipped` counts what was saved of this step before. Rows of micro-batches of other lengths are
    filled with targets of -1.
    """
    length = max(rows.inputs.shape[1] for rows in batches)
    tensors = {}
    for name, fill in (("inputs", 0), ("targets", -1), ("positions", 0)):
        found = [getattr(rows, name) for rows in batches]
        if all(values is not None for values in found):
            tensors[name] = np.stack([_filled(values, length, fill) for values in found])
    file, out = folder / f"bad-step-{step:06d}{f'-{skipped}' * bool(skipped)}.npz", io.BytesIO()
    np.savez(out, allow_pickle=False, **tensors)
    write_file(file, out.getvalue())
    return file


def _filled(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    missing = length - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=fill)
