"""Data parallel training: a rank's share of a step, and what ranks agree on.

The sequences of a step are those of one process, in the same order; rank r of N has the r-th of N
equal parts; while batches grow, parts differ by a sequence at most. Each rank draws all batches,
which is cheap, so that their order and the number of targets need no messages. Letters: S sequences
of a step, B of a micro-batch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptc._version import __version__
from gptc.data.loader import Rows
from gptc.engine import library
from gptc.engine.arrays import count_targets
from gptc.engine.model import Share, StepResult
from gptc.engine.optim import AdamW, Muon
from gptc.engine.options import Options
from gptc.engine.world import World
from gptc.errors import EngineError, GptcError
from gptc.files.words import plural, quoted
from gptc.settings import spelled
from gptc.training.diloco import Diloco
from gptc.training.horizon import Horizon
from gptc.training.options import TrainOptions
from gptc.training.residual import Residuals
from gptc.training.setup import Setup
from gptc.training.signals import Received
from gptc.training.state import State

_NEWS = struct.Struct("<iq")  # a signal or 0, and the number of steps
# Paths differ between hosts; files are compared by their content. Steps and warm-up may follow the
# clock of a rank.
_NOT_COMPARED = ("data", "out", "init_from", "tokenizer", "chat_template", "steps", "warmup_steps")


class Part(NamedTuple):
    """Rows `first` to `end` of a micro-batch of the step."""

    micro: int
    first: int
    end: int


def parts_of(rank: int, size: int, n_micro: int, n_rows: int) -> list[Part]:
    """The rows of a rank among those of a step, S = n_micro n_rows: equal parts within one."""
    begin, end = (n * n_micro * n_rows // size for n in (rank, rank + 1))
    parts = []
    for micro in range(begin // n_rows, -(-end // n_rows)):
        base = micro * n_rows
        parts.append(Part(micro, max(begin - base, 0), min(end - base, n_rows)))
    return parts


def check_sequences(options: TrainOptions, n_ranks: int) -> None:
    """GptcError for steps whose sequences the ranks cannot share equally."""
    n_sequences = options.batch_size * options.grad_accum
    if n_sequences % n_ranks:
        whole = -(-n_sequences // n_ranks) * n_ranks
        raise GptcError(
            f"a step has {n_sequences} sequences (--batch-size {options.batch_size} x --grad-accum "
            f"{options.grad_accum}), which {n_ranks} ranks cannot share equally: use "
            f"--batch-size {whole} --grad-accum 1, or another number of ranks"
        )


def check_options(options: TrainOptions, world: World) -> None:
    """GptcError for options with which the ranks of this job cannot train."""
    check_ranks(options, world.size)
    if world.size > 1 and _on_gpu(options) and not options.sync_every:
        world.open_nccl()


def check_ranks(options: TrainOptions, n_ranks: int) -> None:
    """GptcError for options with which so many ranks cannot train."""
    if n_ranks == 1:
        return
    if not options.tokens_per_step:  # else --grad-accum is not known yet
        check_sequences(options, n_ranks)
    for name, value in {"zero": str(options.zero or ""), "wire": options.wire}.items():
        if value not in ("", "fp32") and _on_gpu(options):
            raise GptcError(
                f"--{name} {value} is for ranks on CPUs: use --device cpu, or leave out --{name}"
            )
    if options.dpo:
        raise GptcError(
            f"--dpo trains in one process, and {n_ranks} ranks are wanted: leave out mpirun or "
            "--ranks"
        )


def _on_gpu(options: TrainOptions) -> bool:
    """Whether a run is on a GPU; adapters are not, unless that is given."""
    if options.device != "auto":
        return options.device == "cuda"
    return not options.lora_rank and Options().resolved().device == "cuda"


def without_effect(options: TrainOptions, n_ranks: int) -> Iterator[str]:
    """Notes about options of ranks that this run does not use."""
    if options.zero and n_ranks == 1:
        yield f"note: --zero {options.zero} has no effect in one process"
    if options.wire != "fp32" and n_ranks == 1:
        yield f"note: --wire {options.wire} has no effect in one process"
    for name in ("outer_lr", "outer_momentum"):
        value = getattr(options, name)
        if not options.sync_every and value != getattr(TrainOptions, name):
            yield f"note: --{spelled(name)} {value:g} has no effect without --sync-every"


def join_gpus(setup: Setup, world: World) -> None:
    """Lets ranks add gradients on GPUs, if their models are there."""
    if world.size == 1 or setup.model.options.device != "cuda" or setup.options.sync_every:
        return
    world.together(world.open_nccl)
    world.together(world.join_gpus)


def shared_threads(options: TrainOptions, world: World) -> TrainOptions:
    """With --threads 0, those of a rank."""
    if world.size == 1 or options.threads:
        return options
    return replace(options, threads=world.share_of_cores())


def described(world: World, threads: int, device: str, options: TrainOptions) -> str:
    """The line about ranks at the start of a run, whose models are on `device`."""
    hosts = len({world.host(rank) for rank in range(world.size)})
    how = "sums in the order of ranks"
    if device == "cuda":
        how = "sums by NCCL"
    if options.zero:
        how += ", the optimizer's state in parts (ZeRO-1)"
    if options.wire != "fp32":
        how += f", sent as {options.wire}"
    if options.sync_every:
        how = f"apart for {plural(options.sync_every, 'step')} at a time (DiLoCo)"
    return (
        f"  ranks   {world.size} on {plural(hosts, 'host')}, "
        f"{plural(threads, 'thread' if device == 'cpu' else 'GPU')} each; {world.transport}, {how}"
    )


# ---- the start ----


def check_same(setup: Setup, world: World) -> None:
    """JobError if a rank differs from rank 0 in anything that must be the same."""
    if world.size == 1:
        return
    every = world.gather_json(_circumstances(setup))
    for rank, found in enumerate(every):
        for name, value in every[0].items():
            if found[name] != value:
                raise world.refusal(
                    f"{world.named(rank)} differs from {world.named(0)} in {name}: "
                    f"{_short(found[name])} and {_short(value)}; all ranks need the same"
                )


def _circumstances(setup: Setup) -> dict[str, object]:
    """What must be the same, by its name in the error."""
    options = asdict(setup.options)
    found = {
        "the version of gptc": __version__,
        "the version of libgpt.so": library.version(),
        "the data": setup.circumstances()["data_sha256"],
        "the weights of --data": setup.data_weights,
        "the tokenizer": setup.tokenizer.fingerprint(),
        "the model's shape": setup.model.config.to_dict(),
        **{
            f"--{name.replace('_', '-')}": value
            for name, value in options.items()
            if name not in _NOT_COMPARED
        },
        "the checkpoint's step": setup.state.step,
        "the checkpoint's batches": setup.loader.position,
    }
    for name in ("device", "dtype", "cpu_level", "threads"):
        found[name.replace("_", " ")] = setup.circumstances()[name]
    found["the weights"] = f"{_weights(setup):08x}"
    return found


def _weights(setup: Setup) -> int:
    """A checksum of all parameters that are trained, and of their optimizer's state."""
    total, model = 0, setup.model
    apart = model.options.n_shards or setup.options.sync_every  # each rank has another state
    same_state = setup.state.step and not apart
    for parameter in model.trained:
        states = model.states(parameter.name) if same_state else ()
        for tensor in ("value", *states):
            total = zlib.crc32(model.read(parameter.name, tensor).data, total)
    return total


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"


def adopt(setup: Setup, world: World) -> None:
    """Gives every rank the number of steps and the options that rank 0 has settled."""
    if world.size == 1:
        return
    steps, most, warmup = world.gather_json(
        [setup.horizon.steps, setup.horizon.most, setup.options.warmup_steps]
    )[0]
    setup.horizon.steps, setup.horizon.most = steps, most
    setup.options = replace(setup.options, steps=steps, warmup_steps=warmup)


def outer_optimizer(setup: Setup, world: World) -> Diloco | None:
    """The outer optimizer of a run, new or as its checkpoint has it; None without --sync-every."""
    options = setup.options
    if not options.sync_every:
        return None
    settings = options.sync_every, options.outer_lr, options.outer_momentum
    outer = Diloco(setup.model, world, *settings)
    if setup.base is not None:
        trainer = setup.base.trainer()
        assert trainer is not None
        outer.restore(setup.base, trainer.get("ranks", 1))
    return outer


def residuals(setup: Setup, world: World) -> Residuals | None:
    """Those of a run, zero or as its checkpoint has them; None where all gradients are sent."""
    if setup.model.options.wire == "fp32":
        return None
    found = Residuals(setup.model, world)
    if setup.base is not None:
        found.restore(setup.base)
    return found


# ---- a step ----


class Parallel:
    """The share of this rank in the steps of a run."""

    def __init__(self, setup: Setup, world: World) -> None:
        self._setup, self._world = setup, world

    def step(self, batches: Sequence[Rows], adamw: AdamW, muon: Muon) -> StepResult:
        """One optimizer step of all ranks on the batches of a step.

        Gradients are added while the last backward pass computes others. A signal is heeded after
        the step, when all ranks have heard of it (`settle`).
        """
        setup, world = self._setup, self._world
        if setup.outer is not None:
            return self._step_apart(setup.outer, batches, adamw, muon)
        own, places = self._own(batches)
        share = Share(
            sum(count_targets(rows.targets) for rows in batches),
            places,
            meet=lambda: world.add_gradients(setup.model),
            begin=lambda: world.begin_gradients(setup.model),
            after=self._after,
        )
        return self._train(own, adamw, muon, share)

    def _step_apart(
        self, outer: Diloco, batches: Sequence[Rows], adamw: AdamW, muon: Muon
    ) -> StepResult:
        """A step of this rank alone on its part, and the outer step if one is due.

        A signal is heeded when all ranks have one model again. The loss is that of the part.
        """
        setup = self._setup
        own, places = self._own(batches)
        n_targets = sum(count_targets(rows.targets) for rows in own)
        result, step = StepResult(0.0, 0.0), setup.state.step + 1
        if n_targets:
            share = Share(n_targets, places, lambda: None)
            result = self._train(own, adamw, muon, share)
        setup.model.step = step  # also of a rank whose part has no target
        if outer.due(step, setup.horizon.steps):
            outer.step()
        return result

    def _own(self, batches: Sequence[Rows]) -> tuple[list[Rows], list[tuple[int, int]]]:
        """The rows of this rank, and the place in the step of each part.

        A rank without a row, in a step that is still small, has one without a target.
        """
        world, n_rows = self._world, len(batches[0].inputs)
        parts = parts_of(world.rank, world.size, len(batches), n_rows)
        if not parts:
            row = _rows(batches[0], Part(0, 0, 1))
            return [row._replace(targets=np.full_like(row.targets, -1))], [(0, 0)]
        return [_rows(batches[part.micro], part) for part in parts], [p[:2] for p in parts]

    def _train(
        self,
        own: Sequence[Rows],
        adamw: AdamW,
        muon: Muon,
        share: Share,
    ) -> StepResult:
        places = [rows.positions for rows in own if rows.positions is not None]
        return self._setup.model.train_step(
            [rows.inputs for rows in own],
            [rows.targets for rows in own],
            positions=places or None,
            muon=muon,
            share=share,
            **vars(adamw),
        )

    def _after(self) -> None:
        if self._setup.model.options.n_shards > 1:
            self._setup.model.gather()


def _rows(rows: Rows, part: Part) -> Rows:
    own = slice(part.first, part.end)
    positions = None if rows.positions is None else rows.positions[own]
    return Rows(rows.inputs[own], rows.targets[own], positions)


@contextmanager
def lost_ranks(
    state: State, run: Path, finish: Callable[[], None], rank: int = 0
) -> Iterator[None]:
    """Says in the error for a lost rank how to continue.

    `finish` waits for the checkpoint being written. Ranks above 0 name none, since rank 0 may not
    have written it yet.
    """
    try:
        yield
    except EngineError as error:
        if error.status == library.GPT_ERR_COMM:
            with suppress(GptcError, OSError):  # what was saved before it is named
                finish()
            source = "" if rank else f" from {state.saved}"
            resume = f"continue{source} with gptc train --resume {quoted(run)}"
            error.args = (f"{error}; {resume if state.saved else 'no checkpoint is saved yet'}",)
        raise


def settle(world: World, signals: Received, horizon: Horizon) -> None:
    """After a step: a signal of one rank ends all, and rank 0 says how many steps there are."""
    if world.size == 1:
        return
    news = world.gather_equal(_NEWS.pack(signals.received or 0, min(horizon.steps, 2**62)))
    heard = [_NEWS.unpack(part) for part in news]
    signals.agreed = next((number for number, _ in heard if number), None)
    horizon.steps = heard[0][1]
