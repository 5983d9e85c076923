"""Training: from scratch, resumed, or fine-tuned.

    summary = train({"data": "stories", "preset": "tiny", "steps": 500})

Everything about a step is a function of its number alone: learning rate, batches (the loader's
position), evaluation, sample, checkpoint. So a run that is interrupted and resumed ends with the
same weights, bit for bit, as an uninterrupted one.

With `minutes`, the number of steps, and with it the learning rate, follows the clock (horizon.py).
A resumed run keeps the number in its checkpoint, so it is a function of the step again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptc._version import __version__
from gptc.checkpoint.facade import Model
from gptc.checkpoint.find import find_checkpoint, open_folder
from gptc.checkpoint.names import ADAPTER, CONFIG
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.options import check_device
from gptc.engine.world import World, join
from gptc.errors import GptcError, UsageError
from gptc.files.words import DAY_S, duration, plural, quoted
from gptc.training import growth
from gptc.training.folder import OthersFolder, RunFolder, choose_folder
from gptc.training.options import TrainOptions
from gptc.training.parallel import (
    adopt,
    check_options,
    check_same,
    check_sequences,
    described,
    join_gpus,
    lost_ranks,
    outer_optimizer,
    residuals,
    settle,
    shared_threads,
    without_effect,
)
from gptc.training.preference import MEASURES
from gptc.training.progress import Meter, PlainProgress, Progress, SilentProgress, StepReport
from gptc.training.reference import prepare_preference
from gptc.training.report import Summary, header, summarize
from gptc.training.resolve import new_options, resumed_options
from gptc.training.schedule import longer
from gptc.training.setup import prepare_data, set_up
from gptc.training.signals import Received, StepDropped, heard_signals
from gptc.training.spikes import Spikes
from gptc.training.trackers import Trackers, find_package, open_trackers
from gptc.training.trainer import Trainer
from gptc.training.trouble import MOST_ROLLBACKS, Diverged, advised

MOST_LINES = 20_000  # of metrics.jsonl, but for evaluations


def train(
    given: Mapping[str, Any],
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, Model], None] | None = None,
) -> Summary:
    """Trains with the options in `given`; missing ones take the preset's defaults.

    With `resume`, a run folder or its newest checkpoint, that run continues, and `given` holds only
    the options to change. `on_step(step, model)` is called after every step. SIGINT, SIGTERM and
    SIGHUP save and end the run early, with `Summary.signal` set.
    """
    world = join()
    show = SilentProgress() if world.rank else progress or PlainProgress()
    try:
        with world.ending_together():
            base, options = world.together(lambda: _asked_for(given, resume))
            world.set_timeout(options.comm_timeout)
            with Run(options, base, show, world) as run:
                return run.train(on_step)
    finally:
        show.close()


def _asked_for(
    given: Mapping[str, Any], resume: str | Path | None
) -> tuple[Checkpoint | None, TrainOptions]:
    """The checkpoint to resume, and the options of the run."""
    base = None if resume is None else _resumable(resume)
    return base, resumed_options(base, given) if base else new_options(given)


def _resumable(path: str | Path) -> Checkpoint:
    """The newest checkpoint of the run at `path`."""
    folder = find_checkpoint(path)
    if folder.is_symlink():  # such as the run's link to its best
        folder = folder.parent / folder.resolve().name
    base = open_folder(folder)
    if "options" not in (base.trainer() or {}):
        raise GptcError(f"{folder} is a model, not a run; fine-tune it with {base.begin}")
    is_checkpoint = any((Path(path) / name).is_file() for name in (CONFIG, ADAPTER))
    newest = find_checkpoint(folder.parent) if is_checkpoint else folder
    if newest != folder:
        raise UsageError(
            f"{folder} is not the newest checkpoint of its run ({newest.name} is); resume the run "
            f"with --resume {quoted(folder.parent)}, or start a new one with {base.begin}"
        )
    return base


class Run:
    """A training run in its folder: set-up, steps, summary."""

    def __init__(
        self, options: TrainOptions, base: Checkpoint | None, show: Progress, world: World
    ) -> None:
        self.show, self.world = show, world
        world.check_gpus(options.device)
        chosen = world.together(lambda: self._checked(options, base))
        options = shared_threads(options, world)
        with ExitStack() as undo:
            if world.size > 1:  # ranks of a host share its files
                world.together(
                    lambda: None if world.local_rank else prepare_data(options, base, show)
                )
            made = world.together(lambda: set_up(options, base, show, world.size, world.rank))
            self.setup = undo.enter_context(closing(made))
            world.share_state(self.setup.model)
            check_same(self.setup, world)
            join_gpus(self.setup, world)
            adopt(self.setup, world)
            self.setup.outer = world.together(lambda: outer_optimizer(self.setup, world))
            self.setup.residuals = world.together(lambda: residuals(self.setup, world))
            state, settled = self.setup.state, self.setup.options
            world.together(lambda: check_sequences(settled, world.size))
            self.folder = undo.enter_context(closing(self._open_folder(chosen)))
            done = "resuming" if base else "training"
            show.note(f"gptc {__version__}: {done} in {self.folder.path}")
            self.trainer = Trainer(self.setup, show, self.folder.path, world)
            for line in header(self.setup, self.trainer.sample_bytes()):
                show.note(line)
            if world.size > 1:
                model = self.setup.model
                show.note(described(world, model.threads, model.options.device, settled))
            for line in without_effect(settled, world.size):
                show.note(line)
            self._trackers = undo.enter_context(world.together(self._open_trackers))
            self.trainer.preference = prepare_preference(self.setup, self.folder.path, show)
            self._went_back: tuple[Path | None, int] = (None, 0)  # to a checkpoint, so often
            n_steps = self.setup.horizon.steps - state.step
            if note := self.folder.disk_note(self.setup.model, settled, n_steps, world.size):
                show.note(note)
            self._opened = undo.pop_all()

    def _checked(self, options: TrainOptions, base: Checkpoint | None) -> Path | None:
        """The folder that was asked for, after checks that need no data."""
        check_device(options.device)  # before data is prepared
        check_options(options, self.world)
        for name in options.trackers:
            find_package(name)
        return choose_folder(options, base)

    def _open_folder(self, chosen: Path | None) -> RunFolder | OthersFolder:
        """The run's folder, which rank 0 makes and writes."""
        setup, world = self.setup, self.world
        opened = world.together(
            lambda: None if world.rank else RunFolder.open(chosen, setup.options, setup.state.step)
        )
        path = world.gather_json(str(opened.path) if opened else "")[0]
        return opened or OthersFolder(Path(path))

    def _open_trackers(self) -> Trackers:
        """The programs of others that rank 0 writes for."""
        path, options = self.folder.path, self.setup.options
        names = [] if self.world.rank else options.trackers
        return open_trackers(names, path.resolve().name, path, asdict(options), self.show.note)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model and the data, and unlocks the run's folder."""
        self._opened.close()

    def train(self, on_step: Callable[[int, Model], None] | None = None) -> Summary:
        """Runs the remaining steps."""
        state, horizon = self.setup.state, self.setup.horizon
        first_step, meter = state.step, Meter()
        if state.step >= horizon.steps:
            command = longer(self.folder.path, state.step, state.lr or 0.0, self.setup.options)
            self.show.note(
                f"the run has done its {state.step:,} steps; continue, at a constant learning "
                f"rate, with {command}"
            )
        elif state.out_of_patience(self.setup.options):
            self.show.note(self._no_patience())
        if self.trainer.held_out is not None and not state.step and not self.world.rank:
            self.trainer.held_out.remember()
        self.show.start(state.step, horizon.steps)
        hearing = heard_signals(self.world.size, quiet=self.world.rank > 0)
        losing = lost_ranks(state, self.folder.path, self.folder.finish, self.world.rank)
        with hearing as signals, losing:
            trained_s = self._steps(signals, meter, on_step)
        self.show.close()
        if state.step > first_step and state.out_of_patience(self.setup.options):
            self.show.note(self._no_patience())
        if horizon.ended_by_clock(state.step):
            assert horizon.budget_s is not None
            self.show.note(f"time is up after {duration(horizon.budget_s)}")
            for given in growth.longer(self.setup.options, state.step):
                self.show.note(f"note: the run ended within {given}")
        sample = None
        if state.step > first_step and signals.ending is None and not self.world.rank:
            self._take_best()
            sample = self._sample()
        return summarize(
            self.setup,
            self.trainer,
            self.folder.path,
            best=self.folder.best(state),
            first_step=first_step,
            trained_s=trained_s,
            train_loss=meter.loss,
            sample=sample,
            signal=signals.ending,
        )

    def _take_best(self) -> None:
        """Gives the model of a run on conversations the weights with the lowest loss.

        Its answers are compared with those before, and it is the one that the run recommends.
        """
        best = self.folder.best(self.setup.state)
        if self.trainer.held_out is None or best is None:
            return
        adapted = self.setup.adapted if self.setup.options.lora_rank else None
        checkpoint = open_folder(best, adapted)
        self.setup.average = None
        for parameter in checkpoint.trained():
            self.setup.model.set(parameter.name, checkpoint.read(parameter.name))
        self.show.note(f"the answers after training are those of {best}, the best checkpoint")

    def _no_patience(self) -> str:
        state, run = self.setup.state, quoted(self.folder.path)
        evaluations = plural(state.since_best, "evaluation")
        return (
            f"the run has ended at step {state.step:,}, after {evaluations} without a better loss; "
            f"continue with gptc train --resume {run} --patience 0"
        )

    def _logged(self, step: int) -> bool:
        """Whether the step has a line in metrics.jsonl, also without an evaluation."""
        steps = self.setup.horizon.steps
        every = self.setup.options.log_every or math.ceil(steps / MOST_LINES)
        return step % every == 0 or step in (1, steps)

    def _steps(
        self,
        signals: Received,
        meter: Meter,
        on_step: Callable[[int, Model], None] | None,
    ) -> float:
        """Runs steps until the last one or a signal; returns the seconds spent in them."""
        setup, trainer, folder = self.setup, self.trainer, self.folder
        state, horizon, options = setup.state, setup.horizon, setup.options
        begin, elapsed_before = time.perf_counter(), state.elapsed_s
        trained_s, spikes = 0.0, Spikes(options.spike_sigmas)
        while state.step < horizon.steps and not state.out_of_patience(options):
            started = time.perf_counter()
            try:
                record = trainer.step(signals.check)
            except Diverged as trouble:
                self._roll_back(trouble)
                continue
            except StepDropped:
                if state.step:
                    folder.save(setup, now=True)
                break
            folder.check()
            step_s = time.perf_counter() - started
            trained_s += step_s
            measures = {name: record[name] for name in MEASURES if name in record}
            meter.add(record["train_loss"], step_s, measures)
            if note := spikes.add(state.step, record["train_loss"]):
                self.show.note(note)
            state.elapsed_s = elapsed_before + time.perf_counter() - begin
            trainer.measure_peak()
            rate = trainer.positions_per_step / step_s
            record["elapsed_s"] = round(state.elapsed_s, 3)
            record["tokens_per_s"] = round(rate, 1)
            record["mfu"] = trainer.mfu(rate)
            horizon.follow_clock(state.step, state.elapsed_s - elapsed_before, step_s)
            if setup.in_step:
                settle(self.world, signals, horizon)
            report = trainer.report(meter, record["lr"])
            self.show.update(report)
            if trainer.n_steps == 1:
                self._note_pace(report)
            last, best = state.step == horizon.steps, False
            if setup.has_val and (state.step % options.eval_every == 0 or last):
                try:
                    record |= trainer.evaluate(last)
                except Diverged as trouble:
                    self._roll_back(trouble)
                    continue
                best = state.best_step == state.step
            if "val_loss" in record or self._logged(state.step):
                folder.write_metrics(record)
                self._trackers.record(record)
            if on_step is not None:
                on_step(state.step, setup.model)
            shown = options.sample_every and state.step % options.sample_every == 0
            if shown and not last and not self.world.rank:
                self.show.note(f"sample at step {state.step}:\n{self._sample()}\n")
            stop = setup.in_step and signals.ending is not None
            last = last or state.out_of_patience(options)
            every = options.save_every or options.eval_every
            state.elapsed_s = elapsed_before + time.perf_counter() - begin
            if last or stop or best or state.step % every == 0:
                folder.save(setup, now=last or stop)
                state.elapsed_s = elapsed_before + time.perf_counter() - begin
            if stop:
                break
        return trained_s

    def _sample(self) -> str:
        """A sample, which samples.jsonl and the trackers get too."""
        step, text = self.setup.state.step, self.trainer.sample()
        self.folder.write_sample(step, text)
        self._trackers.sample(step, text)
        return text

    def _roll_back(self, trouble: Diverged) -> None:
        """With --on-nan rollback, goes back to the last checkpoint; else GptcError."""
        setup, world, state = self.setup, self.world, self.setup.state
        if setup.outer is not None:  # this rank alone has that loss
            raise GptcError(advised(trouble, state, setup.options)) from None
        world.together(self.folder.finish)
        n_before = self._went_back[1] if self._went_back[0] == state.saved else 0
        wanted = setup.options.on_nan == "rollback" and state.saved is not None
        if not wanted or n_before == MOST_ROLLBACKS:
            problem = advised(trouble, state, setup.options)
            after = f"after {plural(n_before, 'rollback')} to {state.saved}: " if n_before else ""
            raise world.refusal(after + problem) from None
        self._went_back = (state.saved, n_before + 1)
        self.show.note(
            f"note: the loss is not finite at step {trouble.step} ({trouble}): going back to "
            f"{state.saved}; the batches since then are skipped"
        )
        world.together(setup.go_back)
        self.folder.go_back(state.step)

    def _note_pace(self, report: StepReport) -> None:
        if report.left_s > DAY_S:
            self.show.note(
                f"note: at this pace the run takes {duration(report.left_s)}; Ctrl-C saves it; "
                "to shorten it, use --minutes, --steps, --grad-accum or a smaller --preset"
            )
