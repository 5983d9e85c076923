"""The report of a run: the lines at its start, and the summary at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptc.data.dataset import Dataset
from gptc.data.description import SPLITS
from gptc.data.mixture import Mixture
from gptc.engine import library
from gptc.engine.options import Plan
from gptc.files.memory import peak_resident_bytes
from gptc.files.words import amount, count, duration, few, plural
from gptc.formats import families
from gptc.tokenizer.base import END_OF_TEXT
from gptc.training import growth
from gptc.training.depth import chosen
from gptc.training.diloco import MOST_NUMBERS, outer_bytes
from gptc.training.held_out import chat_notes
from gptc.training.horizon import count_saves
from gptc.training.options import SHAPE, TrainOptions
from gptc.training.schedule import constant_rate, idle, learning_rate, lowest_rate
from gptc.training.setup import Setup
from gptc.training.trainer import Trainer

MANY_EPOCHS = 100


@dataclass
class Summary:
    """The result of a run. Rates are of this process; `elapsed_s` is of the whole run."""

    out: str
    checkpoint: str | None  # the newest
    finished: bool  # all steps are done
    first_step: int  # steps done before; equal to `step` if none remained
    step: int
    steps: int
    tokens: int
    n_params: int
    train_loss: float | None  # smoothed over the last steps
    val_loss: float | None
    val_bpb: float | None
    val_accuracy: float | None  # of pairs, with --dpo
    val_margin: float | None
    best_val_loss: float | None
    best_step: int | None
    best_checkpoint: str | None  # None if it is the newest
    elapsed_s: float
    tokens_per_s: float | None
    mfu: float | None
    peak_flops: float
    device: str
    dtype: str
    threads: int
    resident_before_bytes: int
    engine_bytes: int
    peak_resident_bytes: int
    planned_peak_bytes: int  # resident before, engine, BLAS, a copy to save, sampling or saving
    sample: str | None = None
    prompt: str = ""  # words of the training text
    chats: bool = False  # the data are conversations
    signal: int | None = None  # the signal that ended it early
    out_of_patience: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def header(setup: Setup, session: int) -> Iterator[str]:
    """The lines and notes at the start of a run, after its first line; as `planned_bytes`."""
    options, config, data = setup.options, setup.model.config, setup.dataset
    n_train, n_val = data.n_tokens("train"), data.n_tokens("val")
    total = growth.Growth(options).tokens(0, setup.horizon.steps)
    epochs = total / setup.loader.epoch_tokens
    yield (
        f"  model   {_origin(setup)} ({families.name(config)}), "
        f"{setup.plan.n_params:,} parameters{_active(setup)}: {plural(config.n_layer, 'layer')}, "
        f"{plural(config.n_head, 'head')}, width {config.n_embd}, context {config.block_size}"
    )
    if options.depth is not None:
        yield f"  depth   {options.depth}: {' '.join(chosen(options))}"
    if lora := setup.model.options.lora:
        trained = sum(math.prod(shape) for _, shape, _ in setup.model.trained)
        yield (
            f"  adapter {'DoRA, ' if lora.dora else ''}rank {lora.rank}, alpha {lora.alpha:g}, "
            f"of {', '.join(lora.targets)}: {trained:,} parameters are trained"
        )
    yield (
        f"  data    {options.named_data}: {n_train:,} training tokens, {n_val:,} for validation, "
        f"{setup.tokenizer.kind} tokenizer"
    )
    for part in data.parts if isinstance(data, Mixture) else ():
        n = part.dataset.n_tokens("train")
        yield (
            f"          {part.weight:.3g} of {part.label}: {n:,} training tokens, "
            f"{_epochs(part.weight * total / n)}"
        )
    if data.is_chats:
        train, val = (data.meta["splits"][split] for split in SPLITS)
        yield (
            f"          {plural(train['rows'], 'conversation')} to train on, {val['rows']:,} held "
            f"out; answers have {train['said']:,} of the tokens"
        )
        if options.dpo:
            yield (
                f"          {plural(setup.loader.n_windows, 'pair')} of answers (DPO, beta "
                f"{options.dpo_beta:g}), {setup.n_val:,} held out"
            )
        elif data.meta["chats"]["layout"] == "preference":
            yield "          only chosen answers are learned; --dpo learns from both"
        yield from chat_notes(setup)
    yield f"  device  {_device(setup)}"
    yield (
        f"  memory  {amount(setup.plan.total_bytes)} for the engine, "
        f"{amount(setup.resident_before)} resident before, "
        f"{amount(planned_bytes(setup, session, setup.state.step))} at the peak"
    )
    yield f"          ({_memory_parts(setup.plan)})"
    size = _size(options, total, is_chats=data.is_chats)
    yield f"  steps   {_steps(setup)} of {size} {_epochs(epochs)}"
    yield from growth.described(options)
    steps = setup.horizon.steps
    for given in growth.longer(options, steps) if setup.horizon.budget_s else ():
        yield (
            f"note: {given} is longer than the run, which is estimated to have "
            f"{plural(steps, 'step')}: none would be whole"
        )
    yield f"  compute {_compute(setup, total)}"
    yield f"  rate    {_rate(setup)}"
    if note := _rate_note(setup):
        yield note
    yield from idle(options, setup.horizon.steps if setup.horizon.budget_s is None else None)
    if setup.model.dtype == "bf16" and setup.model.device == "cpu" and library.cpu_notice():
        yield f"note: {library.cpu_notice()}"
    if epochs > MANY_EPOCHS:
        yield (
            f"note: {few(epochs)} passes over the data will make the model memorize it; limit them "
            "with --epochs, --steps or --minutes"
        )
    if not setup.has_val:
        yield (
            f"note: no evaluations, since the validation split has {n_val:,} tokens"
            + ("" if data.is_chats else f", fewer than --seq-len {options.seq_len}")
        )


def _origin(setup: Setup) -> str:
    if setup.initial is not None:
        return f"from {setup.initial.path}"
    if setup.options.init_from is not None:  # the run is continued
        return f"from {setup.options.init_from}"
    if setup.options.depth is not None:
        return f"{setup.options.preset} of depth {setup.options.depth}"
    if any(getattr(setup.options, name) is not None for name in SHAPE):
        return f"{setup.options.preset} with a modified shape"
    return setup.options.preset


def _active(setup: Setup) -> str:
    """The parameters that a token reads, where those are fewer."""
    active = setup.plan.n_active_params
    return "" if active == setup.plan.n_params else f", of which a token reads {active:,}"


def _device(setup: Setup) -> str:
    model = setup.model
    name = f"cpu ({library.cpu_level()}), {plural(model.threads, 'thread')}"
    if model.device != "cpu":
        name = f"{model.device} ({library.gpu().name})"
    return f"{name}, {model.dtype}; peak {setup.peak_flops / 1e9:,.0f} GFLOP/s, measured"


def _memory_parts(plan: Plan) -> str:
    parts = {
        "weights": plan.param_bytes,
        "gradients": plan.grad_bytes,
        "optimizer": plan.optimizer_bytes,
        "activations": plan.activation_bytes,
        "workspace": plan.workspace_bytes,
    }
    return ", ".join(f"{name} {amount(n_bytes)}" for name, n_bytes in parts.items())


def _compute(setup: Setup, n_tokens: int) -> str:
    """FLOPs by the formula of gptc.training.plan. Conversations may be shorter than a row."""
    flops = setup.plan.train_flops_per_token
    flops += setup.plan.update_flops / setup.options.step_tokens
    step = flops * setup.options.step_tokens
    whole, most = count(flops * n_tokens), "at most " if setup.dataset.is_chats else ""
    return f"{count(flops)} FLOPs per token, {most}{count(step)} per step, {whole} in all"


def _epochs(n: float) -> str:
    return f"{few(n)} epoch{'' if few(n) == '1' else 's'}"


def _size(options: TrainOptions, n_tokens: int, *, is_chats: bool) -> str:
    """What a step reads; of texts, what all steps read too: conversations differ in length."""
    accum = f" x {options.grad_accum}" if options.grad_accum > 1 else ""
    if not is_chats:
        return f"{options.rows} x {options.seq_len}{accum} tokens: {count(n_tokens)} tokens,"
    noun = "pair" if options.dpo else "row" if options.packing == "fit" else "conversation"
    n = options.batch_size
    each = plural(n, noun) if not accum else f"{n}{accum} {noun}s"
    return f"{each} of at most {options.seq_len} tokens:"


def _steps(setup: Setup) -> str:
    state, horizon = setup.state, setup.horizon
    steps = f"from {state.step:,} to {horizon.steps:,}" if state.step else f"{horizon.steps:,}"
    if horizon.budget_s is not None:
        return f"in {duration(horizon.budget_s)}, about {steps}"
    return steps


def _rate(setup: Setup) -> str:
    options, step = setup.options, setup.state.step
    warmup, steps = options.warmup_steps or 0, setup.horizon.steps
    rate = learning_rate(step, steps, options)
    parts = [f"{rate:.3g} at step {step + 1:,}"] if step else []
    if step < warmup:
        parts.append(f"{plural(warmup, 'warm-up step')} to {options.lr:.3g}")
    elif not step:
        parts.append(f"{options.lr:.3g}")
    end = "constant" if options.schedule == "constant" else f"{lowest_rate(options):.3g} at the end"
    return ", ".join([*parts, end if end == "constant" else f"{options.schedule} to {end}"])


def _rate_note(setup: Setup) -> str | None:
    """A note if a resumed run continues at a higher rate than that of its last step."""
    state, options, steps = setup.state, setup.options, setup.horizon.steps
    if state.lr is None or state.step >= steps or state.step < (options.warmup_steps or 0):
        return None
    rate = learning_rate(state.step, steps, options)
    if rate <= 1.1 * state.lr or (state.lr == 0 and options.schedule == "constant"):
        return None
    return (
        f"note: the learning rate rises from {state.lr:.3g} to {rate:.3g}, since its schedule or "
        f"--lr has changed; to avoid that, add: {constant_rate(state.lr, options)}"
    )


def _prompt(dataset: Dataset, block_size: int) -> str:
    """The first words of the training text, "" if they cannot be typed.

    The tokenizer has tokens for them, whatever it lacks. They leave half the context for an answer.
    """
    tokens = np.empty(min(200, dataset.n_tokens("train")), dtype=np.int32)
    dataset.read("train", 0, tokens)
    specials = list(dataset.tokenizer.specials)
    text = dataset.tokenizer.decode(tokens[~np.isin(tokens, specials)])
    lines = [line.strip() for line in text.replace(END_OF_TEXT, "\n").splitlines() if line.strip()]
    words = " ".join(lines[0].split(" ")[:4])[:40].strip() if lines else ""
    while len(dataset.tokenizer.encode(words)) > block_size // 2:
        words = words[:-1].rstrip()
    return words if words.isprintable() and "\ufffd" not in words else ""


def summarize(
    setup: Setup,
    trainer: Trainer,
    out: Path,
    *,
    best: Path | None,
    first_step: int,
    trained_s: float,
    train_loss: float,
    sample: str | None,
    signal: int | None,
) -> Summary:
    """The summary of a run in `out` that began at `first_step` and trained for `trained_s`."""
    state, model, plan = setup.state, setup.model, setup.plan
    pace = trainer.n_positions / trained_s if trained_s and trainer.n_positions else None
    return Summary(
        out=str(out),
        checkpoint=str(state.saved) if state.saved else None,
        finished=state.step >= setup.horizon.steps,
        first_step=first_step,
        step=state.step,
        steps=setup.horizon.steps,
        tokens=state.tokens,
        n_params=plan.n_params,
        train_loss=train_loss if state.step > first_step else None,
        val_loss=state.evaluation.get("val_loss"),
        val_bpb=state.evaluation.get("val_bpb"),
        val_accuracy=state.evaluation.get("val_accuracy"),
        val_margin=state.evaluation.get("val_margin"),
        best_val_loss=state.best_val_loss,
        best_step=state.best_step,
        best_checkpoint=None if best is None else str(best),
        elapsed_s=state.elapsed_s,
        tokens_per_s=pace,
        mfu=trainer.mfu(pace) if pace else None,
        peak_flops=trainer.peak_flops,
        device=model.device,
        dtype=model.dtype,
        threads=model.threads,
        resident_before_bytes=setup.resident_before,
        engine_bytes=plan.total_bytes,
        peak_resident_bytes=peak_resident_bytes(),
        planned_peak_bytes=planned_bytes(setup, trainer.sample_bytes(), first_step),
        sample=sample,
        prompt=_prompt(setup.dataset, model.config.block_size),
        chats=setup.dataset.is_chats,
        signal=signal,
        out_of_patience=state.out_of_patience(setup.options),
        options=asdict(setup.options) | {"steps": setup.horizon.steps},
    )


def planned_bytes(setup: Setup, session: int, first_step: int) -> int:
    """The expected peak of this process's resident memory in a run from `first_step` on.

    `session` are the bytes of a sample (`Trainer.sample_bytes`).
    """
    engine = setup.plan.total_bytes + setup.plan.library_bytes
    if setup.model.device != "cpu":
        engine = session = 0  # they use GPU memory
    shapes = [shape for _, shape, _ in setup.model.config.parameters()]
    saving = 4 * max(int(math.prod(shape)) for shape in shapes)  # one tensor at a time
    n_saves = count_saves(setup.options, first_step, setup.horizon.steps, setup.has_val)
    # The last one is written from the model itself.
    copy = setup.copy_bytes if n_saves > 1 else 0
    n_trained = sum(math.prod(shape) for _, shape, _ in setup.model.trained)
    averages = 4 * 2 * n_trained if setup.average is not None else 0  # and the weights meanwhile
    outer = 0
    if setup.options.sync_every:  # and a group's changes in an outer step, twice
        outer, saving = outer_bytes(n_trained), 2 * max(saving, 4 * min(n_trained, MOST_NUMBERS))
    return setup.resident_before + engine + max(session, saving) + copy + averages + outer
