"""Prepares a run: opens the data, makes the model, and settles the options.

`set_up` does the steps that fail fast first, and changes nothing on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptc.checkpoint.adapter import AdapterCheckpoint
from gptc.checkpoint.facade import Model
from gptc.checkpoint.find import open_folder
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import get_ready
from gptc.data.chat_loader import n_windows
from gptc.data.dataset import Dataset
from gptc.data.description import SPLITS
from gptc.data.known import KNOWN_DATASETS
from gptc.data.loader import Loader
from gptc.data.mixture import parts_of
from gptc.data.pairs import Pairs
from gptc.engine import library
from gptc.engine.arrays import FloatArray
from gptc.engine.options import Plan
from gptc.engine.snapshot import fits, snapshot_bytes
from gptc.files.checksum import recorded_checksum
from gptc.files.memory import resident_bytes
from gptc.formats.model_file import ModelFile
from gptc.settings import spelled
from gptc.tokenizer.base import Tokenizer
from gptc.training.average import Average
from gptc.training.defaults import defaults_for
from gptc.training.diloco import Diloco
from gptc.training.growth import check_growth
from gptc.training.horizon import Horizon, few_rows, time_step
from gptc.training.options import LIMITS, TrainOptions
from gptc.training.progress import Progress
from gptc.training.residual import Residuals
from gptc.training.resolve import stored_options
from gptc.training.run_data import initial_model, open_dataset, open_loader, settle_packing
from gptc.training.run_model import create_model, fill_step, fit_context, model_settings, shape_of
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
    seconds: float  # that `set_up` took, without the preparation of data
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
            self.residuals.restore(base)
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
    open_dataset(options, base, initial_model(options, base), show)


def set_up(
    options: TrainOptions,
    base: Checkpoint | None,
    show: Progress,
    ranks: int = 1,
    rank: int = 0,
) -> Setup:
    """Opens the data, makes the model and sets its weights. `ranks` train it together."""
    begin = time.perf_counter()
    initial = initial_model(options, base)
    opening = time.perf_counter()
    options, dataset = open_dataset(options, base, initial, show)
    if not dataset.already_there:
        begin += time.perf_counter() - opening
    dataset.train_on, dataset.long_rows = options.train_on, options.long_rows
    options = settle_packing(options, dataset, initial, resumed=base is not None)
    config = shape_of(options, base or initial, dataset)
    options = fill_step(fit_context(options, config, show))
    loader = open_loader(options, dataset)
    part = (ranks, rank) if options.zero and ranks > 1 else (0, 0)
    settings, plan = model_settings(options, base, base or initial, config, part, ranks)
    get_ready(dataset.tokenizer, config)
    resident_before = resident_bytes()
    model = create_model(options, base, config, settings)
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
        step_s = None
        if options.minutes:
            n_rows = few_rows(loader, plan, peak_flops)
            step_s = time_step(model, loader, options.grad_accum, n_rows) / ranks
        horizon = Horizon(options, state, loader.epoch_tokens, step_s)
        ends = base is None and horizon.budget_s is None
        check_growth(options, dataset, horizon.steps if ends else None)
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
            seconds=time.perf_counter() - begin,
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
    before, now = trainer["options"].get("optimizer_dtype", "fp32"), setup.options.optimizer_dtype
    if before != now:
        changes.append(f"the moments were {before} and are {now} now")
    if (other := setup.other_data(base)) is not None:
        changes.append(other)
        setup.state.forget_best()
    for changed in changes:
        show.note(f"note: {changed}, so the result will not match an uninterrupted run bit for bit")
