"""A run's folder: config.toml, metrics.jsonl, and the checkpoints ckpt-STEP."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from gptc.checkpoint.adapter import save_adapter
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.metrics import LONGEST_SAMPLE, METRICS, SAMPLES, end_of, sample_of
from gptc.checkpoint.names import (
    BEST,
    ROOT,
    RUN_CONFIG,
    checkpoint_name,
    list_checkpoints,
    model_name,
    step_of,
)
from gptc.checkpoint.reader import Checkpoint
from gptc.checkpoint.writer import save, size_of
from gptc.data.known import KNOWN_DATASETS
from gptc.engine.arrays import FloatArray
from gptc.engine.model import Model
from gptc.engine.snapshot import Snapshot
from gptc.errors import GptcError, UsageError
from gptc.files.behind import Behind
from gptc.files.whole import clean_up, discard, write_file
from gptc.files.words import amount, plural, quoted
from gptc.settings import to_toml
from gptc.training.options import TrainOptions
from gptc.training.setup import Setup
from gptc.training.state import State

_LONGEST_PART = 60  # characters of a model's or dataset's name in that of a run's folder


class _Checkpoint(NamedTuple):
    """A checkpoint to write, apart from the model."""

    path: Path
    options: TrainOptions
    trainer: Mapping[str, Any]
    best: Path | None  # the one with the lowest loss


def _check_files(path: Path) -> None:
    """GptcError where lines would be written to a pipe or a device, which may wait for ever."""
    for file in (path / METRICS, path / SAMPLES):
        if file.exists() and not file.is_file():
            raise GptcError(f"{file} is not a regular file: remove it, or choose another --out")


class RunFolder:
    """The folder of the current run, locked until `close`."""

    def __init__(self, path: Path, metrics: TextIO, options: TrainOptions) -> None:
        self.path = path
        self._metrics = metrics
        self._written = options  # the content of config.toml
        self._behind = Behind("gptc-checkpoint")
        self._saving: Path | None = None  # the checkpoint that was begun last
        self._snapshot: Snapshot | None = None

    @classmethod
    def open(cls, chosen: Path | None, options: TrainOptions, step: int) -> RunFolder:
        """Makes the folder (None = a new one under runs/), and keeps the metrics up to `step`."""
        try:
            if chosen is not None:
                chosen.mkdir(parents=True, exist_ok=True)
            path = chosen or _new_folder(ROOT / default_name(options))
            _check_files(path)
            metrics = (path / METRICS).open("a", encoding="utf-8")
        except OSError as error:
            raise GptcError(
                f"cannot make {error.filename}: {error.strerror}; choose another folder with --out"
            ) from error
        folder = cls(path, metrics, options)
        try:
            # Held until the run ends: two processes must not write to the same folder.
            fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (path / METRICS).open("rb") as lines:
                metrics.truncate(end_of(lines, step))
            folder._cut_samples(step)
            clean_up(path)
            if not (path / BEST).exists():  # a link to a checkpoint that was removed
                (path / BEST).unlink(missing_ok=True)
            folder._write_config(options)
        except BlockingIOError:
            folder.close()
            raise GptcError(
                f"another gptc train is writing to {path}; wait for it or stop it first"
            ) from None
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Waits for the checkpoint being written, and unlocks the folder.

        After a KeyboardInterrupt in a wait, here or before, it does not wait: that checkpoint never
        gets its name.
        """
        try:
            self._behind.wait()
        finally:
            with suppress(OSError):  # a full disk: `write_metrics` has said so
                self._metrics.close()

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        try:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise GptcError(
                f"cannot write {self.path / METRICS}: {error.strerror}; free disk space, then "
                f"gptc train --resume {quoted(self.path)}"
            ) from error

    def write_sample(self, step: int, text: str) -> None:
        """Appends a sample to samples.jsonl, cut to 5,000 characters, unless the disk is full."""
        line = json.dumps({"step": step, "text": text[:LONGEST_SAMPLE]})
        with suppress(OSError), (self.path / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _cut_samples(self, step: int) -> None:
        """Removes the samples after a step."""
        with suppress(FileNotFoundError), (self.path / SAMPLES).open("r+b") as file:
            file.truncate(end_of(file, step, sample_of))

    def go_back(self, step: int) -> None:
        """Removes the metrics and samples after a step."""
        try:
            self._cut_samples(step)
            self._metrics.flush()
            with (self.path / METRICS).open("rb") as lines:
                self._metrics.truncate(end_of(lines, step))
        except OSError as error:
            raise GptcError(f"cannot write {self.path / METRICS}: {error.strerror}") from error

    def check(self) -> None:
        """Raises the error of a checkpoint that could not be written; does not wait."""
        self._behind.check()

    def finish(self) -> None:
        """Waits for the checkpoint being written, and raises its error."""
        self._behind.finish()

    def save(self, setup: Setup, now: bool = False) -> None:
        """Writes a checkpoint of the current step, and removes those beyond --keep-last.

        The best one stays, with a link to it. A thread writes a copy of the model while training
        continues; with `now`, or without memory for a copy, the checkpoint is there on return.
        """
        path = self.path / checkpoint_name(setup.state.step)
        if path in (setup.state.saved, self._saving):
            if now:
                self.finish()
            return
        self.finish()
        # With --minutes, the number of steps changes during the run.
        options = replace(setup.options, steps=setup.horizon.steps)
        trainer = {
            **setup.state.to_json(),
            "loader_position": setup.loader.position,
            "tokenizer_fingerprint": setup.tokenizer.fingerprint(),
            **setup.circumstances(),
            "config": setup.model.config.to_dict(),
            "options": asdict(options),
        }
        best_step = setup.state.best_step
        best = None if best_step is None else self.path / checkpoint_name(best_step)
        made = _Checkpoint(path, options, trainer, best)
        self._saving = path
        snapshot = None if now else self._copied(setup)
        if snapshot is None:
            with setup.averaged() as own:
                self._write(made, setup, setup.model, own)
        else:
            self._behind.start(lambda: self._write(made, setup, snapshot, snapshot.own))

    def _copied(self, setup: Setup) -> Snapshot | None:
        """A copy of the model; None without memory for it, and where a run has none."""
        average = setup.average
        if self._snapshot is None:
            if not setup.has_copy():
                return None
            self._snapshot = Snapshot(setup.model, average is not None)
        self._snapshot.take(setup.model, average.weights if average else None)
        return self._snapshot

    def _write(
        self,
        made: _Checkpoint,
        setup: Setup,
        model: Model | Snapshot,
        own: Mapping[str, FloatArray] | None,
    ) -> None:
        """Writes a checkpoint, which is then the newest; links the best, and removes others."""
        state, path = setup.state, made.path
        try:
            self._behind.check_wanted()
            if made.options != self._written:
                self._write_config(made.options)
            os.fsync(self._metrics.fileno())
            # An existing folder of this name is damaged: a run resumes from the newest whole one.
            also: dict[str, Any] = {
                "tokenizer": setup.tokenizer,
                "trainer": made.trainer,
                "replace": True,
                "own": own,
                "more": setup.of_ranks,
                "check": self._behind.check_wanted,
            }
            if model.options.lora:
                save_adapter(path, model, setup.adapted, **also)
            else:
                save(path, model, **also)
        except (GptcError, OSError) as error:
            resume = f"gptc train --resume {quoted(self.path)}"
            kept = (
                f"{state.saved} is intact: free disk space, then {resume}"
                if state.saved
                else "no checkpoint is saved yet: free disk space or choose another --out"
            )
            raise GptcError(f"{error}; {kept}") from error
        state.saved, best, keep = path, made.best, made.options.keep_last
        self._behind.check_wanted()
        if best is not None and best.is_dir():
            _link(self.path / BEST, best.name)
        elif best is None:  # one before was of other data
            (self.path / BEST).unlink(missing_ok=True)
        if keep:
            # Later ones are damaged, since the run did not resume from them: none to count on.
            known = [old for old in list_checkpoints(self.path) if step_of(old) <= step_of(path)]
            for old in known[:-keep]:
                if old != best:
                    self._behind.check_wanted()
                    discard(old)

    def best(self, state: State) -> Path | None:
        """The checkpoint with the lowest validation loss; None if that is the newest."""
        if state.best_step is None or state.best_step == state.step:
            return None
        folder = self.path / checkpoint_name(state.best_step)
        if not folder.is_dir():
            return None
        link = self.path / BEST
        return link if link.is_symlink() and link.samefile(folder) else folder

    def disk_note(
        self, model: Model, options: TrainOptions, n_steps: int, n_ranks: int = 1
    ) -> str | None:
        """A note if the disk is too small for the checkpoints of `n_steps`; else None."""
        # The best is kept too.
        n = math.ceil(n_steps / min(options.save_every or options.eval_every, options.eval_every))
        if options.keep_last:  # one more, since the oldest is removed after the newest is written
            there = len(list_checkpoints(self.path))
            n = min(n, max(1, options.keep_last + 2 - there))
        needed = n * size_of(model.trained, training=True)
        if options.ema:  # also the weights themselves
            needed += n * size_of(model.trained, training=False)
        if options.sync_every:  # also the outer momentum, and two moments of each other rank
            needed += (2 * n_ranks - 1) * n * size_of(model.trained, training=False)
        if model.options.wire != "fp32":  # also a residual of each rank
            needed += n_ranks * n * size_of(model.trained, training=False)
        free = shutil.disk_usage(self.path).free
        if needed <= free:
            return None
        return (
            f"note: {amount(free)} are free at {self.path}, but {plural(n, 'checkpoint')} will "
            f"take {amount(needed)}: free disk space, or choose another --out or --keep-last"
        )

    def _write_config(self, options: TrainOptions) -> None:
        text = to_toml(options, leave_out=("out",))
        write_file(self.path / RUN_CONFIG, text.encode())
        self._written = options


class OthersFolder:
    """The run's folder for ranks other than 0, which leave it to rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """Does nothing."""

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def write_sample(self, step: int, text: str) -> None:
        """Does nothing."""

    def go_back(self, step: int) -> None:
        """Does nothing."""

    def check(self) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def save(self, setup: Setup, now: bool = False) -> None:
        """Notes the checkpoint, which rank 0 writes, and gives it this rank's part of a state."""
        path, model = self.path / checkpoint_name(setup.state.step), setup.model
        if setup.state.saved != path:  # in the order in which rank 0 writes them
            for parameter in model.trained if model.options.n_shards > 1 else ():
                for state in model.states(parameter.name):
                    model.read(parameter.name, state)
            if (more := setup.of_ranks) is not None:
                for stored in more.shapes:
                    more.read(stored)
        setup.state.saved = path

    def best(self, state: State) -> Path | None:
        """None: rank 0 names it."""
        return None

    def disk_note(
        self, model: Model, options: TrainOptions, n_steps: int, n_ranks: int = 1
    ) -> str | None:
        """None: rank 0 notes it."""
        return None


def choose_folder(options: TrainOptions, base: Checkpoint | None) -> Path | None:
    """The run's folder; None = a new one under runs/."""
    if base is not None:
        return base.path.parent
    if options.out is None:
        return None
    out = Path(options.out)
    # The folder of a run without a checkpoint is reused; its metrics start again.
    if list_checkpoints(out):
        raise UsageError(
            f"{out} already holds a run; continue it with --resume {quoted(out)}, or choose "
            "another --out"
        )
    return out


def default_name(options: TrainOptions) -> str:
    """The name of a run's folder under runs/: MODEL-DATASET."""
    names = [one.name for one in options.mixture] or [options.named_data]
    dataset = "+".join(n if n in KNOWN_DATASETS else Path(n).resolve().stem for n in names)
    what = options.preset if options.depth is None else f"depth-{options.depth}"
    if options.init_from is not None:
        what = Path(options.init_from).name
        if Path(options.init_from).exists():  # else a model of the hub
            what = model_name(open_checkpoint(options.init_from).path)
    return f"{what[:_LONGEST_PART]}-{dataset[:_LONGEST_PART]}"


def _link(link: Path, name: str) -> None:
    """Makes `link` point to a folder next to it, in one step."""
    new = link.with_name(f".{link.name}.new")
    # Where a filesystem has no links, or a file of the user's has that name, there is none.
    with suppress(OSError):
        new.unlink(missing_ok=True)
        new.symlink_to(name)
        new.replace(link)


def _new_folder(path: Path) -> Path:
    """Makes a folder of this name, with -2, -3, ... appended if it exists."""
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
