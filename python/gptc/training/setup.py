"""Prepares a run: opens the data, makes the model, and settles the options.

`set_up` does the steps that fail fast first, and changes nothing on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptc.checkpoint.adapter import AdapterCheckpoint
from gptc.checkpoint.compatible import (
    check_vocabulary,
    is_kind,
    own_tokenizer,
    prepared_with,
    same_tokenizer,
    tokenizer_argument,
)
from gptc.checkpoint.facade import Model
from gptc.checkpoint.find import open_checkpoint, open_folder, tokenizer_name
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import get_ready
from gptc.data.chat_cache import is_chat_file
from gptc.data.chat_loader import make_loader, n_windows
from gptc.data.dataset import Dataset
from gptc.data.description import SPLITS
from gptc.data.known import KNOWN_DATASETS
from gptc.data.loader import Loader
from gptc.data.mixture import MixedLoader, Mixture, not_mixed, parts_of
from gptc.data.pairs import PairLoader, Pairs
from gptc.data.preparation import resolve_dataset
from gptc.engine import library
from gptc.engine.arrays import FloatArray
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora, targets_named
from gptc.engine.options import BlockRows, Options, Plan, plan_for
from gptc.engine.snapshot import fits, snapshot_bytes
from gptc.errors import EngineError, GptcError, UsageError
from gptc.files.checksum import recorded_checksum
from gptc.files.memory import available_bytes, resident_bytes
from gptc.files.words import amount, quoted
from gptc.formats.model_file import ModelFile
from gptc.settings import spelled
from gptc.tokenizer.base import Tokenizer
from gptc.training.average import Average
from gptc.training.chats import open_chats
from gptc.training.defaults import default_alpha, default_tokenizer, defaults_for
from gptc.training.diloco import Diloco
from gptc.training.fitting import what_fits
from gptc.training.horizon import Horizon, time_step
from gptc.training.options import LIMITS, SHAPE, TrainOptions
from gptc.training.progress import Progress
from gptc.training.residual import Residuals
from gptc.training.resolve import stored_options
from gptc.training.state import State


@dataclass
class Setup:
    """A run that is ready to start. Close it to free the model and the data."""

    options: TrainOptions
    base: Checkpoint | None  # the checkpoint to resume
    initial: ModelFile | None  # the model to fine-tune
    dataset: Dataset
    loader: Loader
    model: Model
    plan: Plan
    peak_flops: float  # measured when the model was made
    resident_before: int  # resident bytes of this process before that
    state: State
    horizon: Horizon
    average: Average | None  # of the weights, with --ema
    ranks: int = 1
    outer: Diloco | None = None  # with --sync-every
    residuals: Residuals | None = None  # of several ranks with --wire

    @property
    def in_step(self) -> bool:
        """Whether all ranks have one model now."""
        return self.outer is None or self.outer.due(self.state.step, self.horizon.steps)

    @property
    def of_ranks(self) -> Diloco | Residuals | None:
        """State of all ranks that a checkpoint has in addition."""
        return self.outer or self.residuals

    @property
    def copy_bytes(self) -> int:
        """The memory of a copy of the model, from which a thread writes checkpoints.

        0: there is none, where ranks have parts of a state, which they give as it is written.
        """
        if self.of_ranks is not None or self.model.options.n_shards > 1:
            return 0
        return snapshot_bytes(self.model, self.average is not None)

    def has_copy(self) -> bool:
        """Whether there is such a copy, and memory for it now."""
        return self.copy_bytes > 0 and fits(self.copy_bytes)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data and the model."""
        return self.dataset.tokenizer

    @property
    def adapted(self) -> ModelFile:
        """The model that adapters are trained for."""
        known = self.base.base if isinstance(self.base, AdapterCheckpoint) else self.initial
        assert known is not None
        return known

    @property
    def has_val(self) -> bool:
        """Whether the validation split, of each dataset of a mixture, holds at least one window."""
        return all(self.n_val_of(part.dataset) > 0 for part in parts_of(self.dataset))

    @property
    def n_val(self) -> int:
        """Windows of the validation split, of all datasets of a mixture; or pairs."""
        return sum(self.n_val_of(part.dataset) for part in parts_of(self.dataset))

    def n_val_of(self, dataset: Dataset) -> int:
        """Windows of the validation split of a dataset, or pairs."""
        if self.options.dpo:
            return len(Pairs(dataset, "val", self.options.seq_len))
        return n_windows(dataset, "val", self.options.seq_len)

    @contextmanager
    def averaged(self) -> Iterator[dict[str, FloatArray] | None]:
        """The model has the average of its weights within, if any; yields its own, or None."""
        if self.average is None:
            yield None
            return
        with self.average.applied() as own:
            yield own

    def go_back(self) -> None:
        """Gives the model, its average and the state those of the newest checkpoint.

        The loader stays: the batches since then are not drawn again.
        """
        assert self.state.saved is not None
        base = open_folder(self.state.saved, self.adapted if self.options.lora_rank else None)
        for parameter in base.trained():
            self.model.set(parameter.name, base.read(parameter.name))
        self.average = _restored(base, self.model, self.options)
        if self.residuals is not None:
            self.residuals.restore(base, self.ranks)
        self.state.go_back(base)
        if self.other_data(base):
            self.state.forget_best()

    def close(self) -> None:
        """Frees the model and the data."""
        self.loader.close()
        self.model.close()

    @property
    def data_weights(self) -> list[float]:
        """The weights of --data; none of a single dataset."""
        return [one.weight for one in self.options.mixture]

    def other_data(self, base: Checkpoint) -> str | None:
        """How the data differs from that of a checkpoint, whose losses are then not comparable."""
        trainer = base.trainer()
        assert trainer is not None
        if trainer["data_sha256"] != self.circumstances()["data_sha256"]:
            return f"{self.options.named_data} has changed"
        before = [one.weight for one in stored_options(base).mixture]
        if before != self.data_weights:
            return f"the weights of --data were {before} and are {self.data_weights} now"
        return None

    def circumstances(self) -> dict[str, Any]:
        """The values on which bit-for-bit resuming depends."""
        splits = self.dataset.meta["splits"]
        shards = [
            recorded_checksum(file).partition(":")[2]
            for split in SPLITS
            for shard in splits[split]["shards"]
            for file in (shard, shard.get("mask"))
            if file is not None
        ]
        return {
            "threads": self.model.threads,
            "ranks": self.ranks,
            "device": self.model.device,
            "dtype": self.model.dtype,
            "cpu_level": library.cpu_level(),
            "data_sha256": hashlib.sha256(" ".join(shards).encode()).hexdigest(),
        }


def prepare_data(options: TrainOptions, base: Checkpoint | None, show: Progress) -> None:
    """Prepares the data, so that others find it prepared."""
    _open_dataset(options, base, _initial(options, base), show)


def _initial(options: TrainOptions, base: Checkpoint | None) -> ModelFile | None:
    """The model to fine-tune."""
    if base is not None or options.init_from is None:
        return None
    initial = open_checkpoint(options.init_from)
    if initial.lora is not None:
        raise UsageError(
            f"{options.init_from} holds adapters: continue their run with --resume, or merge "
            f"them first: gptc export {quoted(options.init_from)} --merge --to hf --out CKPT"
        )
    return initial


def set_up(
    options: TrainOptions,
    base: Checkpoint | None,
    show: Progress,
    ranks: int = 1,
    rank: int = 0,
) -> Setup:
    """Opens the data, makes the model and sets its weights. `ranks` train it together."""
    initial = _initial(options, base)
    options, dataset = _open_dataset(options, base, initial, show)
    dataset.train_on, dataset.long_rows = options.train_on, options.long_rows
    config = _shape(options, base or initial, dataset)
    options = _fill_step(_fit_context(options, config, show))
    loader = _loader(options, dataset)
    part = (ranks, rank) if options.zero and ranks > 1 else (0, 0)
    settings, plan = _settings(options, base, base or initial, config, part, ranks)
    get_ready(dataset.tokenizer, config)
    resident_before = resident_bytes()
    model = _create_model(options, base, config, settings)
    try:
        peak_flops = model.peak_flops()
        state, average = State(), None
        if base is not None:
            base.load_into(model)
            average = _restored(base, model, options)
            state = State.of(base)
            trainer = base.trainer()
            assert trainer is not None
            loader.position = trainer["loader_position"]
        elif initial is not None:
            initial.load_into(model)
            if options.lora_rank:
                model.init_adapters(options.seed)
        else:
            model.init(options.seed)
        average = average or _average(options, model)
        step_s = time_step(model, loader, options.grad_accum) if options.minutes else None
        step_s = step_s and step_s / ranks
        horizon = Horizon(options, state, loader.epoch_tokens, step_s)
        setup = Setup(
            options=_settle(options, horizon.steps),
            base=base,
            initial=initial,
            dataset=dataset,
            loader=loader,
            model=model,
            plan=plan,
            peak_flops=peak_flops,
            resident_before=resident_before,
            state=state,
            horizon=horizon,
            average=average,
            ranks=ranks,
        )
        if base is not None:
            _note_changes(setup, base, show)
        return setup
    except BaseException:
        loader.close()
        model.close()
        raise


def _restored(base: Checkpoint, model: Model, options: TrainOptions) -> Average | None:
    """The average of the weights, if any; gives the model the rest of a checkpoint."""
    average = _average(options, model)  # a checkpoint's weights are the average
    base.restore_own(model)
    base.restore_optimizer(model)
    return average


def _average(options: TrainOptions, model: Model) -> Average | None:
    return Average(model, options.ema) if options.ema else None


def _loader(options: TrainOptions, dataset: Dataset) -> Loader:
    """The loader of the training split."""
    sizes, n_ahead = (options.batch_size, options.seq_len, options.seed), options.grad_accum
    if options.dpo:
        return PairLoader(dataset, "train", *sizes, n_ahead=n_ahead)
    if isinstance(dataset, Mixture):
        return MixedLoader(dataset, "train", *sizes, n_ahead=n_ahead)
    return make_loader(dataset, "train", *sizes, n_ahead=n_ahead, packing=options.packing)


def _open_dataset(
    options: TrainOptions, base: Checkpoint | None, initial: ModelFile | None, show: Progress
) -> tuple[TrainOptions, Dataset]:
    """The dataset, prepared with the tokenizer of the resumed or fine-tuned model, if any.

    Also returns the options with that tokenizer.
    """
    known, name = base or initial, options.tokenizer
    own = own_tokenizer(known) if known is not None else None
    names = [one.name for one in options.mixture] or [options.named_data]
    for one in options.mixture:
        if is_chat_file(one.name):
            raise not_mixed(one.name)
    if is_chat_file(options.named_data):
        return open_chats(options, known, own, show, resumed=base is not None)
    own_name = None
    if own and known and (name is None or base is not None):
        own_name = tokenizer_argument(own, known, options.named_data)
    if name is None:
        name = own_name or default_tokenizer(options)
    elif base is not None and not is_kind(name):
        # The tokenizer's original folder may be gone; the checkpoint has a copy.
        name = own_name or name
    name = tokenizer_name(name)
    noted: set[str] = set()

    def report(action: str, n_done: int, n_bytes: int | None) -> None:
        if action not in noted:
            noted.add(action)
            show.note(f"preparing {options.named_data}: {action}")

    def resolved(tokenizer: str) -> Dataset:
        found = [
            resolve_dataset(one, tokenizer, progress=report, notify=show.note) for one in names
        ]
        return Mixture(options.mixture, found) if options.mixture else found[0]

    dataset = resolved(name)
    if base is not None and own and own_name and not same_tokenizer(own, dataset):
        # The text has changed, so a tokenizer learned from it has changed too.
        dataset = resolved(own_name)
    if base is None:
        if str(dataset.folder) in names:
            name = prepared_with(dataset, options.tokenizer)
        options = replace(options, tokenizer=name if is_kind(name) else str(Path(name).resolve()))
    if known is not None:
        check_vocabulary(known, own, dataset)
    if own is not None:
        dataset.adopt(own)  # as in the model's earlier training
    return options, dataset


def _shape(options: TrainOptions, known: ModelFile | None, dataset: Dataset) -> GPTConfig:
    if known is not None:
        return known.config
    changed = {name: getattr(options, name) for name in SHAPE}
    config = GPTConfig.preset(
        options.preset,
        vocab_size=dataset.vocab_size,
        block_size=options.seq_len,
        **{name: value for name, value in changed.items() if value is not None},
    )
    config.check()
    return config


def _fit_context(options: TrainOptions, config: GPTConfig, show: Progress) -> TrainOptions:
    """Lowers --seq-len to the model's context."""
    if options.seq_len <= config.block_size:
        return options
    if options.seq_len != defaults_for("init-from")["seq_len"]:  # given explicitly
        show.note(f"note: --seq-len is lowered to the model's context of {config.block_size}")
    return replace(options, seq_len=config.block_size)


def _fill_step(options: TrainOptions) -> TrainOptions:
    """Sets --grad-accum by --tokens-per-step."""
    wanted, pass_tokens = options.tokens_per_step, options.rows * options.seq_len
    if wanted is None:
        return options
    if wanted < pass_tokens:
        raise UsageError(
            f"--tokens-per-step is {wanted}; a micro-batch of {options.rows} x {options.seq_len} "
            f"tokens is more: use --batch-size {max(1, wanted // options.seq_len)} or less"
        )
    filled = replace(options, grad_accum=-(-wanted // pass_tokens), tokens_per_step=None)
    filled.check()
    return filled


def _lora(options: TrainOptions, config: GPTConfig) -> Lora | None:
    """The adapters that the options ask for."""
    rank = options.lora_rank
    if not rank:
        return None
    targets = targets_named(config, options.lora_targets)
    alpha = default_alpha(rank) if options.lora_alpha is None else options.lora_alpha
    return Lora(rank, alpha, targets, options.lora_dropout, options.lora_kind, options.dora)


def _packing(options: TrainOptions, dtype: str, known: ModelFile | None) -> tuple[BlockRows, ...]:
    """The matrices that stay as a quantized file has them while adapters are trained."""
    if not options.lora_rank or known is None or dtype not in ("auto", "packed"):
        return ()
    blocks = known.packing()
    if dtype == "packed" and not blocks:
        raise UsageError(f"{known.path} has no quantized matrices: choose another --dtype")
    return blocks


def _settings(
    options: TrainOptions,
    base: Checkpoint | None,
    known: ModelFile | None,
    config: GPTConfig,
    part: tuple[int, int],
    ranks: int,
) -> tuple[Options, Plan]:
    """The model's options and memory plan. GptcError if the memory is not available.

    `part` is the number of parts of the optimizer's state, and that of this rank.
    """
    threads, dtype = options.threads, options.dtype
    if base is not None:
        # Bit-for-bit resuming needs the same threads and dtype: the order of sums depends on the
        # number of threads, their rounding on the dtype.
        trainer = base.trainer()
        assert trainer is not None
        threads = threads or min(trainer["threads"], library.cpu_count())
        dtype = trainer["dtype"] if dtype == "auto" else dtype
    blocks = _packing(options, dtype, known)
    settings = Options(
        options.device,
        "packed" if blocks else dtype,
        threads,
        training=True,
        max_batch=options.rows,
        max_seq=options.seq_len,
        dropout=options.dropout,
        seed=options.seed,
        pin=options.pin,
        blocks=blocks,
        lora=_lora(options, config),
        recompute=options.recompute,
        optimizer=options.optimizer,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        n_shards=part[0],
        shard=part[1],
        wire=options.wire if ranks > 1 else "fp32",
    ).resolved()
    try:
        plan = plan_for(config, settings)
    except EngineError as error:
        if "n_threads" not in str(error):
            raise
        raise UsageError(str(error).replace("n_threads", "--threads")) from error
    available = available_bytes()
    if settings.device == "cpu" and available is not None and plan.total_bytes > available:
        # Otherwise the kernel would kill the process later, without a message.
        advice = what_fits(options, config, settings, available, base is not None)
        raise GptcError(
            f"training needs {amount(plan.total_bytes)}, but {amount(available)} are free; {advice}"
        )
    return settings, plan


def _create_model(
    options: TrainOptions, base: Checkpoint | None, config: GPTConfig, settings: Options
) -> Model:
    try:
        return Model(config, settings)
    except EngineError as error:
        if error.status == library.GPT_ERR_MEMORY:
            gpu = settings.device != "cpu"
            free = library.gpu().free_bytes * 63 // 64 if gpu else available_bytes() or 0
            advice = what_fits(options, config, settings, free, base is not None)
            raise GptcError(f"{error}: {advice}") from error
        raise


def _settle(options: TrainOptions, steps: int) -> TrainOptions:
    """Fills in the options that depend on the data or the machine."""
    changes: dict[str, Any] = dict.fromkeys(LIMITS) | {"steps": steps}
    if options.warmup_share is not None:
        changes |= {"warmup_share": None, "warmup_steps": round(options.warmup_share * steps)}
    elif options.warmup_steps is None:
        table = defaults_for("init-from" if options.init_from else options.preset)
        changes["warmup_steps"] = min(int(table["warmup_steps"]), steps // 10)
    # A run may be resumed from a different folder: make paths absolute.
    if isinstance(options.data, str):
        changes["data"] = _absolute(options.data)
    else:
        found = [(_absolute(one.name), one.weight) for one in options.mixture]
        changes["data"] = tuple(f"{name}:{weight!r}" for name, weight in found)
    if options.init_from is not None and Path(options.init_from).exists():
        changes["init_from"] = str(Path(options.init_from).resolve())
    return replace(options, **changes)


def _absolute(data: str) -> str:
    return data if data in KNOWN_DATASETS else str(Path(data).resolve())


def _note_changes(setup: Setup, base: Checkpoint, show: Progress) -> None:
    """Notes what has changed since the checkpoint. The best loss is of the same data alone."""
    trainer = base.trainer()
    assert trainer is not None
    changes = [
        f"{spelled(name)} was {before} and is {value} now"
        for name, value in setup.circumstances().items()
        if name != "data_sha256"
        and (before := trainer.get(name, 1)) != value  # older checkpoints are of one rank
    ]
    if (other := setup.other_data(base)) is not None:
        changes.append(other)
        setup.state.forget_best()
    for changed in changes:
        show.note(f"note: {changed}, so the result will not match an uninterrupted run bit for bit")
