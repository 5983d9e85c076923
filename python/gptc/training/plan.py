"""The plan of a run: arithmetic, memory and time, before it starts.

FLOPs of a token: two for each multiply-add of the products of a forward pass, with half the keys of
a sequence for causal attention (csrc/model/config.c), times three for a training step, and those of
the update's products, divided by the step's tokens. Norms, activations and softmax are left out.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptc.checkpoint.writer import save, size_of
from gptc.data.chat_loader import all_batches
from gptc.data.dataset import Dataset
from gptc.data.description import SPLITS
from gptc.data.mixture import parts_of
from gptc.engine import library
from gptc.engine.model import Model
from gptc.engine.options import plan_for
from gptc.engine.snapshot import Snapshot
from gptc.errors import GptcError
from gptc.files.checksum import file_checksum
from gptc.files.memory import available_bytes
from gptc.files.whole import write_chunks
from gptc.files.words import duration, plural, span
from gptc.training.growth import Growth
from gptc.training.horizon import count_multiples, count_saves, few_rows
from gptc.training.options import MOST_TOKENS
from gptc.training.report import planned_bytes
from gptc.training.schedule import optimizers
from gptc.training.setup import Setup
from gptc.training.trainer import WHOLE_AT_END, Trainer

CALIBRATION_S = 2.0
_TIMED_S = 0.4  # of a pass, at most, where it can have fewer rows: a single one may be disturbed
_AT_LEAST = 3  # passes, if one takes less than CALIBRATION_S
_WRITTEN = 1 << 26  # bytes of a checkpoint that are written to time it
_SAMPLED = 4, 20  # tokens of the samples that are timed


@dataclass(frozen=True)
class Costs:
    """Measured seconds of the parts of a run."""

    first_s: float  # by which the first step, whose memory is not there yet, takes longer
    pass_s: float  # forward and backward of a micro-batch
    pass_positions: float  # of its rows, which conversations do not fill
    update_s: float  # with that of --ema
    eval_s: float  # a batch of an evaluation
    save_s: float  # the share of a checkpoint that training waits for, or loses to its thread
    last_save_s: float  # the last checkpoint, which the run waits for
    sample_s: float  # a sample of as many tokens as a document has in the mean

    def step_s(self, grad_accum: int) -> float:
        """Seconds of a step."""
        return grad_accum * self.pass_s + self.update_s


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Bytes are of this process, or of the engine on a GPU."""

    n_params: int
    flops_per_token: float
    flops: float  # of all steps
    engine_bytes: int
    planned_peak_bytes: int
    steps: int
    step_tokens: int
    tokens: int  # of all steps, with the padding of rows
    epochs: float
    costs: Costs
    step_s: float
    n_eval_batches: int
    n_saves: int
    n_samples: int
    start_s: float  # before the first step
    seconds: float  # of the whole run: start, steps, evaluations, checkpoints and samples
    tokens_per_s: float
    mfu: float
    largest_batch: int | None  # that fits into free memory; None: not known
    calibration_s: float
    options: dict[str, Any]


def forecast(setup: Setup, trainer: Trainer, folder: Path, before_s: float = 0.0) -> Forecast:
    """The plan of the run, after a calibration that changes the model's weights.

    A checkpoint is written for a moment to `folder`, or to the folder above that exists. `before_s`
    are the seconds of the process before `set_up`.
    """
    begin = time.perf_counter()
    options, state = setup.options, setup.state
    costs = _measure(setup, trainer, folder)
    _follow_costs(setup, costs)
    steps = setup.horizon.steps - state.step
    step_s = costs.step_s(options.grad_accum)
    n_batches, n_last_batches = _evaluations(setup)
    n_saves = count_saves(options, state.step, setup.horizon.steps, setup.has_val)
    between_s = n_batches * costs.eval_s + max(0, n_saves - 1) * costs.save_s
    n_samples = _samples(setup)
    after_s = n_last_batches * costs.eval_s + n_samples * costs.sample_s
    after_s += costs.last_save_s if n_saves else 0.0
    growth = Growth(options)
    positions = costs.pass_positions * options.grad_accum
    # What steps that are still growing have, in whole ones.
    n_whole = growth.tokens(state.step, state.step + steps) / options.step_tokens
    tokens = round(n_whole * positions)
    plan, planned = setup.plan, planned_bytes(setup, trainer.sample_bytes(), state.step)
    steps_s = n_whole * options.grad_accum * costs.pass_s + steps * costs.update_s
    steps_s += costs.first_s if steps else 0.0
    start_s = before_s + setup.seconds
    flops = plan.train_flops_per_token + plan.update_flops / options.step_tokens
    return Forecast(
        n_params=plan.n_params,
        flops_per_token=flops,
        flops=flops * tokens,
        engine_bytes=plan.total_bytes,
        planned_peak_bytes=planned,
        steps=steps,
        step_tokens=options.step_tokens,
        tokens=tokens,
        epochs=n_whole * options.step_tokens / setup.loader.epoch_tokens,
        costs=costs,
        step_s=step_s,
        n_eval_batches=n_batches + n_last_batches,
        n_saves=n_saves,
        n_samples=n_samples,
        start_s=start_s,
        seconds=start_s + steps_s + between_s + after_s,
        tokens_per_s=positions / step_s,
        mfu=trainer.mfu(positions / step_s),
        largest_batch=largest_batch(setup),
        calibration_s=time.perf_counter() - begin,
        options=asdict(replace(options, steps=setup.horizon.steps)),
    )


def _follow_costs(setup: Setup, costs: Costs) -> None:
    """With --minutes, sets the number of steps to that which fits into the time.

    The last evaluation and checkpoint come after that time.
    """
    options, first, horizon = setup.options, setup.state.step, setup.horizon
    if horizon.budget_s is None:
        return
    n_saves = count_saves(options, first, horizon.steps, setup.has_val)
    between_s = _evaluations(setup)[0] * costs.eval_s + max(0, n_saves - 1) * costs.save_s
    whole_s = horizon.budget_s - between_s - costs.first_s
    whole = whole_s / costs.step_s(options.grad_accum) * options.step_tokens
    fitting = Growth(options).steps_for(first, whole - options.step_tokens + 1)
    horizon.steps = min(horizon.most, first + max(1, fitting))


def described(found: Forecast) -> Iterator[str]:
    """The lines of a plan that follow those of a run's start."""
    costs = found.costs
    yield (
        f"  time    {_about(found.seconds)}: {span(found.start_s)} to start, "
        f"{plural(found.steps, 'step')} of {span(found.step_s)}, "
        f"{plural(found.n_eval_batches, 'batch', 'batches')} to evaluate of "
        f"{span(costs.eval_s)}, {plural(found.n_saves, 'checkpoint')} of "
        f"{span(costs.save_s)}, {span(costs.last_save_s)} at the end, "
        f"{plural(found.n_samples, 'sample')} of {span(costs.sample_s)} (measured in "
        f"{span(found.calibration_s)})"
    )
    yield (
        f"  pace    {found.tokens_per_s:,.0f} tokens/s, {found.mfu:.0%} of the peak; a step is "
        f"{found.options['grad_accum']} x {span(costs.pass_s)} and an update of "
        f"{span(costs.update_s)}"
    )
    if found.largest_batch is not None:
        yield f"  fits    --batch-size {found.largest_batch} at most, in the memory that is free"


def largest_batch(setup: Setup) -> int | None:
    """The largest --batch-size whose plan fits into free memory, with this model's own; or None."""
    options, model = setup.options, setup.model
    free = available_bytes() if model.device == "cpu" else library.gpu().free_bytes
    if free is None:
        return None
    room = free + setup.plan.total_bytes  # it is taken already
    rows = options.rows // options.batch_size
    extra = setup.plan.library_bytes if model.device == "cpu" else 0

    def fits(batch_size: int) -> bool:
        sized = replace(model.options, max_batch=rows * batch_size)
        return plan_for(model.config, sized).total_bytes + extra <= room

    low, high = options.batch_size, max(1, MOST_TOKENS // (rows * options.seq_len))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _measure(setup: Setup, trainer: Trainer, folder: Path) -> Costs:
    """Seconds of each part. A pass and an update come before, which find memory and caches cold.

    Where a pass takes long, it has fewer rows, and its time is in proportion.
    """
    options, model, loader = setup.options, setup.model, setup.loader
    passes: list[float] = []
    sizes: list[int] = []
    updates: list[float] = []
    adamw, muon = optimizers(options.lr, options.momentum, options)

    def one_pass() -> None:
        rows = loader.next_rows()
        sizes.append(rows.inputs.size)
        model.backward(rows.inputs, rows.targets, positions=rows.positions)

    def update() -> None:
        model.update(adamw, muon)
        if setup.average:
            setup.average.update(1)

    whole, n_cold = loader.batch_size, few_rows(loader, setup.plan, setup.peak_flops)
    loader.batch_size = n_cold
    cold_s = _timed(one_pass)
    cold_and_update_s = cold_s + _timed(update)
    if not setup.dataset.is_chats:
        loader.batch_size = min(n_cold, max(1, int(n_cold * _TIMED_S / cold_s)))
    sizes.clear()
    end = time.perf_counter() + 0.8 * CALIBRATION_S
    while (
        not passes
        or (len(passes) < _AT_LEAST and passes[-1] < CALIBRATION_S)
        or time.perf_counter() < end
    ):
        passes.append(_timed(one_pass))
        updates.append(_timed(update))
    more, loader.batch_size = whole / loader.batch_size, whole
    rates, positions = np.divide(passes, sizes), more * float(np.mean(sizes))
    pass_s = float(np.mean(rates[usual(rates)])) * positions
    update_s = float(np.mean(np.array(updates)[usual(updates)]))
    return Costs(
        max(0.0, cold_and_update_s - pass_s * n_cold / whole - update_s),
        pass_s,
        positions,
        update_s,
        _eval_s(setup),
        *_save_s(setup, folder),
        _sample_s(setup, trainer),
    )


def usual(values: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """The indices of values (N,) without the tenth that are smallest and the tenth largest.

    So a moment in which the machine does other work does not count. Of fewer than ten, those of the
    median.
    """
    order = np.argsort(np.asarray(values), kind="stable")
    cut = len(order) // 10 or (len(order) - 1) // 2
    return order[cut : len(order) - cut]


def _eval_s(setup: Setup) -> float:
    """Seconds of a batch of an evaluation, the mean over those of all datasets; 0 without one."""
    if not setup.has_val:
        return 0.0
    parts = [part.dataset for part in parts_of(setup.dataset)]
    seconds = [_eval_s_of(setup, part, 0.1 * CALIBRATION_S / len(parts)) for part in parts]
    return float(np.average(seconds, weights=_sampled_batches(setup)))


def _eval_s_of(setup: Setup, data: Dataset, most_s: float) -> float:
    """The same of a dataset, measured for `most_s` seconds."""
    options, model = setup.options, setup.model
    found, begin = [], time.perf_counter()
    n_rows = few_rows(setup.loader, setup.plan, setup.peak_flops)
    for x, y in all_batches(data, "val", n_rows, options.seq_len, None):
        at = data.positions(x)
        found.append(_timed(lambda x=x, y=y, at=at: model.loss(x, y, at)))  # type: ignore[misc]
        if len(found) > 1 and time.perf_counter() - begin > most_s:
            break
    rest = np.array(found[1:] or found)
    return float(np.mean(rest[usual(rest)])) * options.batch_size / n_rows


def _save_s(setup: Setup, folder: Path) -> tuple[float, float]:
    """Seconds of a checkpoint for a run that continues, and for one that waits.

    Of a whole one, or in proportion if it is large. A run that continues waits for the copy of the
    model, and shares its threads with the one that writes.
    """
    model, n_bytes = setup.model, size_of(setup.model.trained, training=True)
    copied: Model | Snapshot = model
    copied_s = 0.0
    n_saves = count_saves(setup.options, setup.state.step, setup.horizon.steps, setup.has_val)
    if has_copy := n_saves > 1 and setup.has_copy():  # the last one has none: it would add memory
        copied = snapshot = Snapshot(model)
        snapshot.take(model)  # whose memory is then there
        copied_s = _timed(lambda: snapshot.take(model))
    above = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        place = tempfile.TemporaryDirectory(dir=above, prefix=".gptc-plan-")
    except OSError as error:
        raise GptcError(
            f"cannot write to {above} ({error.strerror}): choose another folder with --out"
        ) from None
    with place as name:
        if n_bytes <= _WRITTEN and model.options.lora is None:
            whole = {"tokenizer": setup.tokenizer, "trainer": {"step": 1}}
            busy_s = -time.thread_time()
            waited_s = _timed(lambda: save(Path(name) / "ckpt", copied, **whole))  # type: ignore[arg-type]
            busy_s += time.thread_time()
            return (copied_s + busy_s / model.threads if has_copy else waited_s), waited_s
        part, block = min(n_bytes, _WRITTEN), bytes(1 << 20)
        file = Path(name) / "part"

        def write() -> None:
            write_chunks(file, (block for _ in range(math.ceil(part / len(block)))))
            file_checksum(file)

        busy_s = -time.thread_time()
        waited_s = _timed(write) * n_bytes / part
        busy_s = (busy_s + time.thread_time()) * n_bytes / part
        return (copied_s + busy_s / model.threads if has_copy else waited_s), waited_s


def _sample_s(setup: Setup, trainer: Trainer) -> float:
    """Seconds of a sample: a part and the time of each token, from two short ones."""
    if trainer.held_out is not None:
        return _timed(trainer.sample)

    def least_s(n_tokens: int) -> float:
        return min(_timed(lambda: trainer.sample(n_tokens)) for _ in range(2))

    trainer.sample(1)  # whose memory is then there
    few_tokens, more_tokens = _SAMPLED
    few_s, more_s = least_s(few_tokens), least_s(more_tokens)
    token_s = max(0.0, more_s - few_s) / (more_tokens - few_tokens)
    return few_s + token_s * (_sample_tokens(setup, trainer) - few_tokens)


def _sample_tokens(setup: Setup, trainer: Trainer) -> float:
    """Tokens of a sample, in the mean, if each ends the text as often as in the data."""
    most, share = trainer.most_sampled, 0.0
    for part in parts_of(setup.dataset):
        meta = part.dataset.meta
        n_documents = sum(source.get("documents", 1) for source in meta["sources"])
        n_tokens = sum(part.dataset.n_tokens(split) for split in SPLITS)
        share += part.weight * min(1.0, n_documents / n_tokens)
    return -math.expm1(most * math.log1p(-share)) / share if 0 < share < 1 else most


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _samples(setup: Setup) -> int:
    """Samples of a run: at the end, on the way, and of conversations before the first step."""
    options, first, last = setup.options, setup.state.step, setup.horizon.steps
    if last <= first:
        return 0
    every = options.sample_every
    n = count_multiples(first, last, every) if every else 1  # the last step has one anyway
    return n + (setup.dataset.is_chats and not first)


def _evaluations(setup: Setup) -> tuple[int, int]:
    """Batches of the evaluations before the last step, and after it, where all are cheap."""
    options, first, last = setup.options, setup.state.step, setup.horizon.steps
    if not setup.has_val or last <= first:
        return 0, 0
    n = count_multiples(first, last, options.eval_every)
    at_end = 0
    if _is_sampled(setup) and setup.n_val <= _n_sampled(setup) * WHOLE_AT_END:
        at_end = sum(_all_batches(setup, part.dataset) for part in parts_of(setup.dataset))
    each = sum(_sampled_batches(setup))
    return (n - 1) * each, each + at_end


def _n_sampled(setup: Setup) -> int:
    """Windows that --eval-batches asks for, of all datasets."""
    options = setup.options
    return options.eval_batches * options.batch_size * len(list(parts_of(setup.dataset)))


def _is_sampled(setup: Setup) -> bool:
    return 0 < _n_sampled(setup) < setup.n_val


def _sampled_batches(setup: Setup) -> list[int]:
    """Batches of each dataset in an evaluation."""
    each = [_all_batches(setup, part.dataset) for part in parts_of(setup.dataset)]
    most = setup.options.eval_batches
    return [min(n, most) for n in each] if _is_sampled(setup) else each


def _all_batches(setup: Setup, data: Dataset) -> int:
    """Batches of the whole validation split."""
    options = setup.options
    rest = 0 if data.is_chats else (data.n_tokens("val") - 1) % options.seq_len
    return math.ceil(setup.n_val_of(data) / options.batch_size) + (rest > 0)


def _about(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
