"""Training: from scratch, resumed, or fine-tuned.

    summary = train({"data": "stories", "preset": "tiny", "steps": 500})

What happens at a step is a function of the step alone: its learning rate, its batches (the loader's
position), whether it is evaluated, sampled or saved. So a run that is interrupted and resumed ends
with the same weights, bit for bit, as one that was not.

Only with `minutes` does the number of steps, and with it the learning rate, follow the clock, so
that the rate has fallen when the time is up. Each checkpoint records the number that was expected
then, and a run that is resumed keeps to it: from there on it is a function of the step again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gptc._version import __version__
from gptc.checkpoint.compatible import (
    check_vocabulary,
    is_kind,
    own_tokenizer,
    prepared_with,
    same_tokenizer,
    tokenizer_argument,
)
from gptc.checkpoint.facade import Model
from gptc.checkpoint.find import find_checkpoint, open_checkpoint, tokenizer_name
from gptc.checkpoint.names import ROOT, checkpoint_name, list_checkpoints
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save, size_of
from gptc.data.dataset import SPLITS, Dataset
from gptc.data.known import KNOWN_DATASETS
from gptc.data.loader import Loader
from gptc.data.preparation import resolve_dataset
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.engine.model import session_bytes
from gptc.engine.options import Options, Plan, plan_for
from gptc.errors import EngineError, GptcError, UsageError
from gptc.eval.loss import bits_per_byte, evaluate
from gptc.files.checksum import recorded_checksum
from gptc.files.memory import peak_resident_bytes, resident_bytes
from gptc.files.whole import clean_up, discard
from gptc.files.words import DAY_S, amount, count, duration, few, plural
from gptc.formats.model_file import ModelFile
from gptc.generation.decoder import Generation
from gptc.generation.request import prompt_tokens
from gptc.generation.sampling import Sampling
from gptc.tokenizer.base import Tokenizer
from gptc.training.options import (
    LIMITS,
    SHAPE,
    TrainOptions,
    default_tokenizer,
    defaults_for,
    new_options,
    resumed_options,
    spelled,
    to_toml,
)
from gptc.training.progress import Meter, PlainProgress, Progress, Report
from gptc.training.progress import step_label as label
from gptc.training.schedule import learning_rate
from gptc.training.signals import StepDropped, heard_signals

METRICS = "metrics.jsonl"
CONFIG_FILE = "config.toml"
SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.5
WHOLE_AT_END = 10  # times the batches of an evaluation that the last one may have
MANY_EPOCHS = 100
PEAK_EVERY_S = 5.0  # between two looks at what the machine can do


@dataclass
class Summary:
    """How a run ended. Rates and times are of this process; `elapsed_s` is of the whole run."""

    out: str
    checkpoint: str | None  # its newest
    finished: bool  # all its steps are done
    first_step: int  # the steps done before; equal to `step` where there was nothing to do
    step: int
    steps: int
    tokens: int
    n_params: int
    train_loss: float | None  # smoothed over the last steps
    val_loss: float | None
    val_bpb: float | None
    best_val_loss: float | None
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
    planned_peak_bytes: int  # before, engine, matrix library, sampling or saving, mapped data
    sample: str | None = None
    signal: int | None = None  # the signal that ended it early
    options: dict[str, Any] = field(default_factory=dict)


def train(
    given: Mapping[str, Any],
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, Model], None] | None = None,
) -> Summary:
    """Trains with the options in `given`; what it lacks comes from the preset's defaults.

    With `resume`, a run folder or its newest checkpoint, the run there continues, and `given` holds
    only what shall change. `on_step(step, model)` is called after every step. SIGINT, SIGTERM and
    SIGHUP end the run early, saved, with `Summary.signal` set.
    """
    show = progress or PlainProgress()
    try:
        base = None if resume is None else _resumable(resume)
        options = resumed_options(base, given) if base else new_options(given)
        with Run(options, base, show) as run:
            return run.train(on_step)
    finally:
        show.close()


def _resumable(path: str | Path) -> Checkpoint:
    """The newest checkpoint of the run at `path`."""
    folder = find_checkpoint(path)
    base = Checkpoint(folder)
    if "options" not in (base.trainer() or {}):
        raise GptcError(
            f"{folder} is a model, not a training run; fine-tune it with --init-from {folder}"
        )
    newest = folder if folder != Path(path) else find_checkpoint(folder.parent)
    if newest != folder:
        raise UsageError(
            f"{folder} is not the newest checkpoint of its run, {newest.name} is; resume the run "
            f"with --resume {folder.parent}, or branch off with --init-from {folder}"
        )
    return base


# ---- the run ----


class Run:
    """One training run in its folder."""

    def __init__(self, options: TrainOptions, base: Checkpoint | None, show: Progress) -> None:
        self.options = options
        self.show = show
        self.base = base
        self.step = 0
        self.tokens = 0
        self.elapsed_s = 0.0
        self.best_val_loss: float | None = None
        self.evaluation: dict[str, float] = {}  # the last one
        self.saved: Path | None = None
        self._metrics: TextIO | None = None
        Options(options.device).resolved()  # before anything is prepared for a device in vain
        # What the weights come from: nothing, this run's own checkpoint, or another model.
        initial: ModelFile | None = None
        if base is None and options.init_from is not None:
            initial = open_checkpoint(options.init_from)
        chosen = self._choose_folder()
        self.dataset = self._open_dataset(base or initial)
        self.tokenizer: Tokenizer = self.dataset.tokenizer
        config = self._shape(base or initial)
        if options.seq_len > config.block_size:
            if options.seq_len != defaults_for("init-from")["seq_len"]:  # it was asked for
                show.note(
                    f"note: --seq-len is lowered to the model's context of {config.block_size}"
                )
            self._change(seq_len=config.block_size)
        options = self.options
        self.loader = Loader(
            self.dataset,
            "train",
            options.batch_size,
            options.seq_len,
            options.seed,
            n_ahead=options.grad_accum,
        )
        self.has_val = self.dataset.n_tokens("val") > options.seq_len
        self.tokens_per_step = options.batch_size * options.seq_len * options.grad_accum

        self.model = self._create_model(config)
        try:
            if base is not None:
                self._restore(base)
            elif initial is not None:
                initial.load_into(self.model)
            else:
                self.model.init(options.seed)
            self.steps = self._count_steps()
            self._check_that_steps_remain()
            self._settle()
            self.out = self._make_folder(chosen)
            self._print_header(initial)
            self._check_disk()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model and lets go of the data and the run's folder."""
        self.loader.close()
        self.model.close()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def train(self, on_step: Callable[[int, Model], None] | None = None) -> Summary:
        """Runs the remaining steps."""
        options, meter = self.options, Meter()
        first, begin = self.step, time.perf_counter()
        elapsed_before, trained_s = self.elapsed_s, 0.0
        if self.step >= self.steps:
            self.show.note(
                f"the run has done its {self.step:,} steps; train on with "
                f"gptc train --resume {self.out} --steps {2 * self.step}"
            )
        sample = None
        self.show.start(self.step, self.steps)
        with heard_signals() as signals:
            while self.step < self.steps:
                started = time.perf_counter()
                try:
                    record = self._do_step(signals.check)
                except StepDropped:
                    if self.step:
                        self._save()
                    break
                step_s = time.perf_counter() - started
                trained_s += step_s
                meter.add(record["train_loss"], step_s)
                self.elapsed_s = elapsed_before + time.perf_counter() - begin
                rate = self.tokens_per_step / step_s
                self._measure_peak()
                record["elapsed_s"] = round(self.elapsed_s, 3)
                record["tokens_per_s"] = round(rate, 1)
                record["mfu"] = self._mfu(rate)
                if self._budget_s is not None:
                    self._follow_clock(self.elapsed_s - elapsed_before, self.step - first)
                report = self._report(meter, record["lr"])
                self.show.update(report)
                if self.step == first + 1 and report.left_s > DAY_S:
                    self.show.note(
                        f"note: at this pace the run takes {duration(report.left_s)}; Ctrl-C saves "
                        "it; shorter: --minutes, --steps, --grad-accum, a smaller --preset"
                    )

                last = self.step == self.steps
                if self.has_val and (self.step % options.eval_every == 0 or last):
                    record |= self._evaluate(last)
                self._write_metrics(record)
                if on_step is not None:
                    on_step(self.step, self.model)
                if options.sample_every and self.step % options.sample_every == 0 and not last:
                    self.show.note(f"sample at step {self.step}:\n{self._sample()}\n")
                stop = signals.received is not None
                if last or stop or self.step % (options.save_every or options.eval_every) == 0:
                    self._save()
                if stop:
                    break
        self.show.close()
        finished = self.step >= self.steps
        if finished and self._budget_s is not None and self.step < self._most_steps:
            self.show.note(f"time is up after {duration(self._budget_s)}")
        if self.step > first and signals.received is None:
            sample = self._sample()
        pace = (self.step - first) * self.tokens_per_step / trained_s if trained_s else None
        session = session_bytes(self.model, 1, self._sample_context())
        return Summary(
            out=str(self.out),
            checkpoint=str(self.saved) if self.saved else None,
            finished=finished,
            first_step=first,
            step=self.step,
            steps=self.steps,
            tokens=self.tokens,
            n_params=self.plan.n_params,
            train_loss=meter.loss if self.step > first else None,
            val_loss=self.evaluation.get("val_loss"),
            val_bpb=self.evaluation.get("val_bpb"),
            best_val_loss=self.best_val_loss,
            elapsed_s=self.elapsed_s,
            tokens_per_s=pace,
            mfu=self._mfu(pace) if pace else None,
            peak_flops=self.peak_flops,
            device=self.model.device,
            dtype=self.model.dtype,
            threads=self.model.threads,
            resident_before_bytes=self.resident_before,
            engine_bytes=self.plan.total_bytes,
            peak_resident_bytes=peak_resident_bytes(),
            planned_peak_bytes=self._planned_bytes(session),
            sample=sample,
            signal=signals.received,
            options=asdict(self.options),
        )

    def _planned_bytes(self, session: int) -> int:
        """The most memory that this process should have had in RAM."""
        splits = self.dataset.meta["splits"].values()
        shards = [shard["file"] for split in splits for shard in split["shards"]]
        mapped: int = sum((self.dataset.folder / shard).stat().st_size for shard in shards)
        # The kernel maps the pages of a shard around those that are read.
        n_read = 2 * self.step * self.options.batch_size * self.options.grad_accum
        mapped = min(mapped, n_read * (64 << 10))
        engine = self.plan.total_bytes + self.plan.library_bytes
        if self.model.device != "cpu":
            engine = session = 0  # they have memory of their own
        shapes = [shape for _, shape, _ in self.model.config.parameters()]
        saving = 4 * max(int(math.prod(shape)) for shape in shapes)  # one tensor at a time
        return self.resident_before + engine + max(session, saving) + mapped

    # ---- setting up ----

    def _change(self, **changes: Any) -> TrainOptions:
        self.options = TrainOptions(**{**asdict(self.options), **changes})
        return self.options

    def _open_dataset(self, known: ModelFile | None) -> Dataset:
        """Opens the data, prepared with the tokenizer of the checkpoint that we go on from."""
        options, name = self.options, self.options.tokenizer
        own = own_tokenizer(known) if known is not None else None
        own_name = None
        if own and known and (name is None or self.base is not None):
            own_name = tokenizer_argument(own, known, options.data)
        if name is None:
            name = own_name or default_tokenizer(options)
        elif self.base is not None and not is_kind(name):
            # The folder that it came from may be gone; the checkpoint has it.
            name = own_name or name
        name = tokenizer_name(name)
        noted: set[str] = set()

        def report(action: str, n_done: int, n_bytes: int | None) -> None:
            if action not in noted:
                noted.add(action)
                self.show.note(f"preparing {options.data}: {action}")

        dataset = resolve_dataset(options.data, name, progress=report)
        if self.base is not None and own and own_name and not same_tokenizer(own, dataset):
            # The text has changed, and with it the tokenizer that is learned from it.
            dataset = resolve_dataset(options.data, own_name, progress=report)
        if self.base is None:
            if dataset.folder == Path(options.data):
                name = prepared_with(dataset, options.tokenizer)
            self._change(tokenizer=name if is_kind(name) else str(Path(name).resolve()))
        if known is not None:
            check_vocabulary(known, own, dataset)
        if own is not None:
            dataset.tokenizer.bos = own.bos  # the model goes on with what it was taught
        return dataset

    def _shape(self, known: ModelFile | None) -> GPTConfig:
        if known is not None:
            return known.config
        options = self.options
        changed = {name: getattr(options, name) for name in SHAPE}
        config = GPTConfig.preset(
            options.preset,
            vocab_size=self.dataset.vocab_size,
            block_size=options.seq_len,
            **{name: value for name, value in changed.items() if value is not None},
        )
        config.check()
        return config

    def _create_model(self, config: GPTConfig) -> Model:
        """The model, without weights yet; also measures what it is compared with."""
        options = self.options
        threads, dtype = options.threads, options.dtype
        if self.base is not None:
            # The same bits as without a stop: sums are taken in an order that depends on the number
            # of threads, and rounded to the dtype.
            trainer = self.base.trainer()
            assert trainer is not None
            threads = threads or min(trainer["threads"], library.cpu_count())
            dtype = trainer["dtype"] if dtype == "auto" else dtype
        settings = Options(
            options.device,
            dtype,
            threads,
            training=True,
            max_batch=options.batch_size,
            max_seq=options.seq_len,
            dropout=options.dropout,
            seed=options.seed,
            pin=options.pin,
        ).resolved()
        try:
            self.plan: Plan = plan_for(config, settings)
        except EngineError as error:
            if "n_threads" not in str(error):
                raise
            raise UsageError(str(error).replace("n_threads", "--threads")) from error
        _check_memory(self.plan, settings.device, options)
        self.resident_before = resident_bytes()
        try:
            model = Model(config, settings)
            self.peak_flops, self._peak_at = model.peak_flops(), time.monotonic()
            return model
        except EngineError as error:
            if error.status == library.GPT_ERR_MEMORY:
                raise GptcError(f"{error}; lower --batch-size or --seq-len") from error
            raise

    def _restore(self, base: Checkpoint) -> None:
        """Takes up the run where its checkpoint left it."""
        trainer = base.trainer()
        assert trainer is not None
        base.load_into(self.model)
        base.restore_optimizer(self.model)
        self.step = trainer["step"]
        self.tokens = trainer["tokens"]
        self.elapsed_s = trainer["elapsed_s"]
        self.loader.position = trainer["loader_position"]
        self.best_val_loss = trainer["best_val_loss"]
        self.evaluation = trainer["evaluation"]
        self.saved = base.path
        for name, value in self._circumstances().items():
            if trainer[name] != value:
                changed = f"{spelled(name)} was {trainer[name]} and is {value} now"
                if name == "data_sha256":
                    changed = f"{self.options.data} has changed"
                self.show.note(
                    f"note: {changed}, so the result will not be the same to the last bit as "
                    "without the interruption"
                )

    def _circumstances(self) -> dict[str, Any]:
        """What must be the same for a resumed run to end with the same bits."""
        splits = self.dataset.meta["splits"]
        shards = [
            recorded_checksum(shard).partition(":")[2]
            for split in SPLITS
            for shard in splits[split]["shards"]
        ]
        return {
            "threads": self.model.threads,
            "device": self.model.device,
            "dtype": self.model.dtype,
            "cpu_level": library.cpu_level(),
            "data_sha256": hashlib.sha256(" ".join(shards).encode()).hexdigest(),
        }

    def _count_steps(self) -> int:
        """The steps of the whole run: the first of its limits that is reached.

        Those that the time allows are a first guess, of which `_follow_clock` makes better ones.
        """
        options, limits = self.options, []
        self._budget_s = None if options.minutes is None else options.minutes * 60
        if options.steps is not None:
            limits.append(options.steps)
        remaining = []
        if options.tokens is not None:
            remaining.append((options.tokens - self.tokens) / self.tokens_per_step)
        if options.epochs is not None:
            tokens = options.epochs * self.dataset.n_tokens("train")
            remaining.append((tokens - self.tokens) / self.tokens_per_step)
        limits += [self.step + max(0, math.ceil(n)) for n in remaining]
        self._most_steps = max(1, min(limits)) if limits else sys.maxsize
        if self._budget_s is None:
            return self._most_steps
        # The rest of the time is for updates, evaluations and saving.
        n_steps = math.ceil(0.9 * self._budget_s / self._time_step())
        return min(self._most_steps, self.step + n_steps)

    def _follow_clock(self, spent_s: float, n_done: int) -> None:
        """Makes the steps those that fit into the time, at the pace so far with all that it took.

        They are the ones that are done when the time is up. The last one may end a little later.
        """
        assert self._budget_s is not None
        n_left = max(0, round((self._budget_s - spent_s) * n_done / spent_s))
        self.steps = min(self._most_steps, self.step + n_left)

    def _check_that_steps_remain(self) -> None:
        """Refuses limits that the run is past, before its folder is touched."""
        given = [name for name in LIMITS if getattr(self.options, name) is not None]
        # A run that has done its steps, and is told nothing new, only says so.
        if self.steps < self.step or (self.steps == self.step > 0 and given != ["steps"]):
            raise UsageError(
                f"the run is at step {self.step:,} ({self.tokens:,} tokens), which is past "
                f"{', '.join(f'--{name} {getattr(self.options, name)}' for name in given)}; "
                f"train on with --steps {2 * self.step}"
            )

    def _settle(self) -> None:
        """Replaces options that depend on the data or the machine by what they turned out to be."""
        options = self.options
        changes = dict.fromkeys(LIMITS) | {"steps": self.steps}
        if options.warmup_steps is None:
            table = defaults_for("init-from" if options.init_from else options.preset)
            changes["warmup_steps"] = min(int(table["warmup_steps"]), self.steps // 10)
        # A run may be resumed from elsewhere: paths become absolute.
        if options.data not in KNOWN_DATASETS:
            changes["data"] = str(Path(options.data).resolve())
        if options.init_from is not None and Path(options.init_from).exists():
            changes["init_from"] = str(Path(options.init_from).resolve())
        self._change(**changes)

    def _time_step(self) -> float:
        """Seconds that a step takes, from a few whose gradients are thrown away."""
        x, y = self.loader.next()
        self.loader.position -= len(x)
        self.model.backward(x, y)
        begin = time.perf_counter()
        for _ in range(2):
            self.model.backward(x, y)
        seconds = (time.perf_counter() - begin) / 2
        self.model.zero_gradients()
        return max(seconds * self.options.grad_accum, 1e-6)

    def _choose_folder(self) -> Path | None:
        """The run's folder; None for a new one under runs/."""
        if self.base is not None:
            return self.base.path.parent
        if self.options.out is None:
            return None
        out = Path(self.options.out)
        # One that ended before its first checkpoint is worth nothing; its metrics are begun anew.
        if list_checkpoints(out):
            raise UsageError(
                f"{out} holds a run already; continue it with --resume {out}, or choose "
                "another --out"
            )
        return out

    def _make_folder(self, chosen: Path | None) -> Path:
        """Makes the folder, and opens metrics.jsonl after the lines of the steps done."""
        try:
            if chosen is not None:
                chosen.mkdir(parents=True, exist_ok=True)
            out = chosen or _new_folder(ROOT / default_name(self.options))
            file = (out / METRICS).open("a+", encoding="utf-8")
        except OSError as error:
            raise GptcError(
                f"cannot make {error.filename}: {error.strerror}; choose another folder with --out"
            ) from error
        self._metrics = file
        try:
            # Held until the run ends: two processes must not train into the same folder.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GptcError(
                f"another gptc train is writing to {out}; wait for it or stop it first"
            ) from None
        file.seek(0)
        file.truncate(sum(len(line.encode()) for line in _lines_until(file, self.step)))
        clean_up(out)
        self._write_config(out)
        return out

    def _write_config(self, out: Path) -> None:
        (out / CONFIG_FILE).write_text(to_toml(self.options), "utf-8")

    def _print_header(self, initial: ModelFile | None) -> None:
        options, config, plan, data = self.options, self.model.config, self.plan, self.dataset
        origin = options.preset
        if initial is not None:
            origin = f"from {initial.path}"
        elif any(getattr(options, name) is not None for name in SHAPE):
            origin = f"{options.preset} with another shape"
        where = self.model.device
        if where == "cpu":
            where += f" ({library.cpu_level()}), {plural(self.model.threads, 'thread')}"
        else:
            where += f" ({library.gpu().name})"
        where += f", {self.model.dtype}"
        where += f"; peak {self.peak_flops / 1e9:,.0f} GFLOP/s, measured"
        parts = ", ".join(
            f"{name} {amount(getattr(plan, f'{key}_bytes'))}"
            for name, key in (
                ("weights", "param"),
                ("gradients", "grad"),
                ("optimizer", "optimizer"),
                ("activations", "activation"),
                ("workspace", "workspace"),
            )
        )
        epochs = self.steps * self.tokens_per_step / data.n_tokens("train")
        accum = f" x {options.grad_accum}" if options.grad_accum > 1 else ""
        total = self.steps * self.tokens_per_step
        n_train = data.n_tokens("train")
        begin = f"from {self.step:,} to {self.steps:,}" if self.step else f"{self.steps:,}"
        if self._budget_s is not None:
            begin = f"in {duration(self._budget_s)}, about {begin}"
        lines = (
            f"gptc {__version__}: {'resuming' if self.base else 'training'} in {self.out}",
            f"  model   {origin} ({config.family}), {plan.n_params:,} parameters: "
            f"{plural(config.n_layer, 'layer')}, {plural(config.n_head, 'head')}, "
            f"width {config.n_embd}, context {config.block_size}",
            f"  data    {options.data}: {n_train:,} training tokens, "
            f"{data.n_tokens('val'):,} for validation, {self.tokenizer.kind} tokenizer",
            f"  device  {where}",
            f"  memory  {amount(plan.total_bytes)} for the engine, "
            f"{amount(self.resident_before)} resident before",
            f"          ({parts})",
            f"  steps   {begin} of {options.batch_size} x {options.seq_len}{accum} tokens: "
            f"{count(total)} tokens, {few(epochs)} epochs",
        )
        for line in lines:
            self.show.note(line)
        if (
            self.model.dtype == "bf16"
            and self.model.device == "cpu"
            and (notice := library.cpu_notice())
        ):
            self.show.note(f"note: {notice}")
        if epochs > MANY_EPOCHS:
            self.show.note(
                f"note: the run goes over its text {few(epochs)} times, which a model learns by "
                "heart; shorter: --epochs, --steps, --minutes"
            )
        if not self.has_val:
            self.show.note(
                f"note: the validation split has {data.n_tokens('val'):,} tokens, fewer than "
                f"--seq-len {options.seq_len}, so there are no evaluations"
            )

    def _check_disk(self) -> None:
        """Says at the start what would otherwise be found hours later."""
        options, there = self.options, len(list_checkpoints(self.out))
        n = math.ceil((self.steps - self.step) / (options.save_every or options.eval_every))
        if options.keep_last:  # one more while the oldest is still there
            n = min(n, max(1, options.keep_last + 1 - there))
        each = size_of(self.model.config, training=True)
        free = shutil.disk_usage(self.out).free
        if n * each > free:
            self.show.note(
                f"note: {amount(free)} are free at {self.out}, and {plural(n, 'checkpoint')} will "
                f"take {amount(n * each)}: make room, or choose another --out or --keep-last"
            )

    # ---- steps ----

    def _do_step(self, check: Callable[[], None]) -> dict[str, Any]:
        """A step; what `check` raises between its micro-batches drops it whole."""
        options, position = self.options, self.loader.position
        lr = learning_rate(self.step, self.steps, options)
        batches = [self.loader.next() for _ in range(options.grad_accum)]
        try:
            result = self.model.train_step(
                [x for x, _ in batches],
                [y for _, y in batches],
                lr=lr,
                beta1=options.beta1,
                beta2=options.beta2,
                eps=options.eps,
                weight_decay=options.weight_decay,
                grad_clip=options.grad_clip,
                check=check,
            )
            diverged = not math.isfinite(result.loss)
        except StepDropped:
            self.loader.position = position  # its batches are drawn again
            raise
        except EngineError as error:
            if error.status != library.GPT_ERR_NUMERIC:
                raise
            diverged = True
        if diverged:
            way_on = (
                f"the last checkpoint is {self.saved}; go on from it with "
                f"gptc train --resume {self.out} --lr {options.lr / 3:.2g}"
                if self.saved
                else f"try a smaller --lr than {options.lr:g} or more --warmup-steps"
            )
            raise GptcError(f"the loss is not finite at step {self.step + 1}; {way_on}")
        self.step += 1
        self.tokens += self.tokens_per_step
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": 0.0,  # the caller's, as are the next two; here for the order
            "train_loss": _short(result.loss),
            "lr": _short(lr),
            "grad_norm": _short(result.grad_norm),
        }

    def _evaluate(self, last: bool) -> dict[str, float]:
        """The loss over the validation split, in nats per token and in bits per byte.

        That of the last step is over the whole split, as `gptc eval` has it, where that is cheap.
        """
        options, n_batches = self.options, self.options.eval_batches
        n_windows = (self.dataset.n_tokens("val") - 1) // options.seq_len
        enough = n_batches * options.batch_size * (WHOLE_AT_END if last else 1)
        if n_windows <= enough:
            n_batches = 0
        result = evaluate(
            self.model,
            self.dataset,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            n_batches=n_batches or None,
        )
        loss, bpb = result.loss, result.bpb
        if self.best_val_loss is None or loss < self.best_val_loss:
            self.best_val_loss = loss
        self.evaluation = {"val_loss": _short(loss), "val_bpb": _short(bpb)}
        part = f"  (over {plural(n_batches, 'batch', 'batches')})" if n_batches else ""
        self.show.note(
            f"{label(self.step, self.steps)}  val loss {loss:.4f}  val bpb {bpb:.3f}{part}"
        )
        return self.evaluation

    def _sample_context(self) -> int:
        n_prompt = len(prompt_tokens(self.tokenizer, ""))
        return min(self.model.config.block_size, n_prompt + SAMPLE_TOKENS - 1)

    def _sample(self) -> str:
        generation = Generation(
            self.model,
            self.tokenizer,
            "",
            max_tokens=SAMPLE_TOKENS,
            sampling=Sampling(temperature=SAMPLE_TEMPERATURE, seed=self.options.seed),
        )
        return "".join(piece for _, piece in generation).strip()

    def _save(self) -> None:
        path = self.out / checkpoint_name(self.step)
        if self.saved == path:
            return
        if settled := self.options.steps != self.steps:  # by the clock
            self._change(steps=self.steps)
        trainer = {
            "step": self.step,
            "tokens": self.tokens,
            "loader_position": self.loader.position,
            "elapsed_s": round(self.elapsed_s, 3),
            "best_val_loss": self.best_val_loss,
            "evaluation": self.evaluation,
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            **self._circumstances(),
            "config": self.model.config.to_dict(),
            "options": asdict(self.options),
        }
        assert self._metrics is not None
        try:
            if settled:
                self._write_config(self.out)
            os.fsync(self._metrics.fileno())
            # A folder of this name can only be damaged: a run resumes from its newest whole one.
            save(path, self.model, tokenizer=self.tokenizer, trainer=trainer, replace=True)
        except (GptcError, OSError) as error:
            kept = (
                f"{self.saved} is intact: make room, then gptc train --resume {self.out}"
                if self.saved
                else "no checkpoint was saved yet: make room or choose another --out"
            )
            raise GptcError(f"{error}; {kept}") from error
        self.saved = path
        if self.options.keep_last:
            for old in list_checkpoints(self.out)[: -self.options.keep_last]:
                discard(old)

    def _write_metrics(self, record: Mapping[str, Any]) -> None:
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise GptcError(
                f"cannot write {self.out / METRICS}: {error.strerror}; make room, then "
                f"gptc train --resume {self.out}"
            ) from error

    def _measure_peak(self) -> None:
        """Now and then, since a shared machine is not always as fast as at the start."""
        if time.monotonic() - self._peak_at > PEAK_EVERY_S:
            before, self.peak_flops = self.peak_flops, max(self.peak_flops, self.model.peak_flops())
            if self.peak_flops > 1.1 * before:
                self.show.note(
                    f"note: the peak is {self.peak_flops / 1e9:,.0f} GFLOP/s now, of which mfu is "
                    "a share from here on"
                )
            self._peak_at = time.monotonic()

    def _mfu(self, tokens_per_s: float) -> float:
        """The share of the machine's peak that the model's arithmetic reaches."""
        return round(self.plan.train_flops_per_token * tokens_per_s / self.peak_flops, 4)

    def _report(self, meter: Meter, lr: float) -> Report:
        rate = self.tokens_per_step / meter.step_s
        return Report(
            step=self.step,
            steps=self.steps,
            loss=meter.loss,
            bpb=bits_per_byte(meter.loss, self.dataset, "train"),
            lr=lr,
            tokens_per_s=rate,
            mfu=self._mfu(rate),
            left_s=(self.steps - self.step) * meter.step_s,
        )


# ---- fine-tuning ----


# ---- folders ----


def default_name(options: TrainOptions) -> str:
    """The name of a run's folder under runs/: what is trained, and on what."""
    data = options.data
    dataset = data if data in KNOWN_DATASETS else Path(data).resolve().stem
    what = options.preset
    if options.init_from is not None:
        what = Path(options.init_from).name
        if Path(options.init_from).exists():  # else it is a model of the hub
            base = open_checkpoint(options.init_from).path.resolve()
            what = base.parent.name if base.name.startswith("ckpt-") else base.name
            what = base.stem if base.is_file() else what
    return f"{what}-{dataset}"


def _new_folder(path: Path) -> Path:
    """Makes a folder of this name, or with -2, -3, ... after it."""
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _lines_until(file: TextIO, step: int) -> Iterator[str]:
    """The whole lines of metrics.jsonl up to a step."""
    for line in file:
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line


# ---- measures ----


def _check_memory(plan: Plan, device: str, options: TrainOptions) -> None:
    """Says that a model cannot fit before the system ends the process for it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return
    if device == "cpu" and plan.total_bytes > available:
        raise GptcError(
            f"training needs {amount(plan.total_bytes)} and {amount(available)} are free; lower "
            f"--batch-size (now {options.batch_size}) or --seq-len (now {options.seq_len})"
        )


def _short(value: float) -> float:
    """The shortest decimal that is still this float32."""
    return float(f"{value:.9g}")


# ---- interruptions ----
