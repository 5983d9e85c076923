"""Training steps, evaluations and samples of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gptc.data.loader import Rows
from gptc.data.mixture import parts_of
from gptc.engine import library
from gptc.engine.model import StepResult
from gptc.engine.options import plan_for
from gptc.engine.session import session_bytes
from gptc.engine.world import World
from gptc.errors import EngineError
from gptc.eval.loss import bits_per_byte, evaluate
from gptc.files.words import plural
from gptc.generation.decoder import Generation
from gptc.generation.options import Sampling
from gptc.generation.request import prompt_tokens
from gptc.training.growth import Growth, pieces
from gptc.training.held_out import HeldOut
from gptc.training.parallel import Parallel
from gptc.training.preference import Preference
from gptc.training.progress import Meter, Progress, StepReport, described, step_label
from gptc.training.ratios import UpdateRatios
from gptc.training.schedule import learning_rate, momentum, optimizers
from gptc.training.setup import Setup
from gptc.training.signals import StepDropped
from gptc.training.trouble import MOST_SKIPPED, Diverged, first_bad, first_output, save_batches

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.5
WHOLE_AT_END = 10  # the last evaluation covers the whole split up to this many times eval_batches
RISE = 1.02  # the validation loss over its best that is noted
PEAK_EVERY_S = 5.0  # seconds between measurements of the machine's peak


class Trainer:
    """Runs the steps of a run. Their effects are in `setup.state`."""

    def __init__(
        self,
        setup: Setup,
        show: Progress,
        folder: Path,
        world: World | None = None,
    ) -> None:
        self._setup = setup
        self._world = world or World()
        shared = self._world.size > 1 or setup.outer is not None
        self._parallel = Parallel(setup, self._world) if shared else None
        self._folder = folder  # for the batches of a step that has failed
        self._show = show
        self.peak_flops = setup.peak_flops * setup.ranks
        self._rise_noted: int | None = None  # the best step when a rise was noted
        self._peak_at = time.monotonic()
        self.n_steps = self.n_positions = 0  # of this process
        self._growth = Growth(setup.options)
        self._step_positions = setup.options.step_tokens  # of the last step
        self.preference: Preference | None = None  # with --dpo
        self.held_out = HeldOut(setup) if setup.dataset.is_chats else None

    @property
    def positions_per_step(self) -> float:
        """Positions of a step, with the padding of rows.

        Of the last one; of conversations, whose rows differ in length, the mean of this process.
        """
        if not self.n_steps or not self._setup.dataset.is_chats:
            return self._step_positions
        return self.n_positions / self.n_steps

    def step(self, check: Callable[[], None]) -> dict[str, Any]:
        """Runs a step; returns its record for metrics.jsonl.

        An exception from `check` drops the step. It is called between micro-batches, and on a CPU
        between layers. Diverged: its loss is not finite, and neither are those of the batches that
        --on-nan skip took instead.
        """
        setup, state, options = self._setup, self._setup.state, self._setup.options
        position = setup.loader.position
        lr = learning_rate(state.step, setup.horizon.steps, options)
        measures: dict[str, float] = {}
        ratios = UpdateRatios(setup.model) if self._compared(state.step + 1) else None
        for n_skipped in range(MOST_SKIPPED + 1):
            at = setup.loader.position
            if options.debug_nans:
                setup.model.check_ops()  # from nothing
            batches = self._draw(state.step)
            try:
                with self._ended_by(check):
                    result, measures = self._apply(at, batches, lr, check)
                break
            except StepDropped:
                setup.loader.position = position  # so that its batches are drawn again
                raise
            except EngineError as error:
                if error.status != library.GPT_ERR_NUMERIC:
                    raise
                trouble = self._trouble(batches, n_skipped)
                if options.on_nan != "skip" or n_skipped == MOST_SKIPPED:
                    raise Diverged(trouble, state.step + 1) from None
                self._show.note(
                    f"note: the loss is not finite at step {state.step + 1} ({trouble}): "
                    "its batches are skipped"
                )
        if not math.isfinite(result.loss):
            raise Diverged("each gradient is finite", state.step + 1)
        if options.debug_nans and (found := setup.model.not_finite()) is not None:
            self._show.note(
                f"note: {first_output(found)} of step {state.step + 1}, whose gradients are finite"
            )
        state.step += 1
        sizes = ratios.measure() if ratios else {}
        if setup.average is not None:
            setup.average.update(state.step)
        state.tokens += self._growth.tokens(state.step - 1, state.step)
        self.n_steps += 1
        self._step_positions = sum(rows.inputs.size for rows in batches)
        self.n_positions += self._step_positions
        state.lr = lr
        return {
            "step": state.step,
            "tokens": state.tokens,
            "elapsed_s": 0.0,  # set by the caller; here for the order of keys
            "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "train_loss": _short(result.loss),
            "lr": _short(lr),
            "grad_norm": _short(result.grad_norm),
            **{name: _short(value) for name, value in measures.items()},
            **{name: _short(value) for name, value in sizes.items()},
        }

    def _draw(self, step: int) -> list[Rows]:
        """The micro-batches of step `step` (from 0)."""
        loader, size = self._setup.loader, self._growth.size(step)
        loader.batch_size = size.rows
        drawn = (loader.next_rows() for _ in range(size.batches))
        return [part for rows in drawn for part in pieces(rows, size.cuts, self._setup.dataset)]

    def _compared(self, step: int) -> bool:
        """Whether the step's update is compared with the weights: at the steps of evaluations."""
        options, steps = self._setup.options, self._setup.horizon.steps
        return self._world.rank == 0 and (step % options.eval_every == 0 or step == steps)

    def _ended_by(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Lets `check` end a pass too, unless other ranks would wait for its result."""
        return library.ended_by(check) if self._world.size == 1 else nullcontext()

    def _apply(
        self, position: int, batches: list[Rows], lr: float, check: Callable[[], None]
    ) -> tuple[StepResult, dict[str, float]]:
        """The passes and the update; measures of pairs. EngineError leaves the weights as is."""
        setup, state, options = self._setup, self._setup.state, self._setup.options
        adamw, muon = optimizers(lr, momentum(state.step, options), options)
        if self.preference is not None:
            return self.preference.step(position, batches, adamw, muon, check)
        if self._parallel is not None:
            return self._parallel.step(batches, adamw, muon), {}
        places = [rows.positions for rows in batches if rows.positions is not None]
        result = setup.model.train_step(
            [rows.inputs for rows in batches],
            [rows.targets for rows in batches],
            positions=places or None,
            muon=muon,
            check=check,
            **vars(adamw),
        )
        return result, {}

    def _trouble(self, batches: list[Rows], n_skipped: int) -> str:
        """What was not finite, and the file with the batches."""
        alone = self._setup.outer is not None  # this rank alone has that loss
        found = first_bad(self._setup.model, None if alone else self._world)
        if self._world.rank and not alone:
            return found  # which rank 0 says, with the file
        file = save_batches(self._folder, self._setup.state.step + 1, batches, n_skipped)
        return f"{found}; the batch is in {file}"

    def evaluate(self, last: bool) -> dict[str, float]:
        """The loss on the validation split, in nats per token and in bits per byte.

        After the last step it covers the whole split, as in `gptc eval`, if that is cheap. The
        losses that are compared are always of the same batches. Diverged: one is not finite.
        """
        setup, state, options = self._setup, self._setup.state, self._setup.options
        n_batches = options.eval_batches
        n_all = setup.n_val
        n_sampled = n_batches * options.batch_size * len(list(parts_of(setup.dataset)))
        if n_all <= n_sampled:
            n_batches = 0
        with setup.averaged():
            result = self._evaluated(n_batches)
        state.compare(result["val_loss"])
        rise = self._rise(result["val_loss"])
        if last and n_batches and n_all <= n_sampled * WHOLE_AT_END:
            n_batches = 0
            with setup.averaged():
                result = self._evaluated(0)
        state.evaluation = {name: _short(value) for name, value in result.items()}
        part = f"  (over {plural(n_batches, 'batch', 'batches')})" if n_batches else ""
        label = step_label(state.step, setup.horizon.steps)
        self._show.note(f"{label}  {described(result)}{part}")
        if rise:
            self._show.note(rise)
        return state.evaluation

    def _evaluated(self, n_batches: int) -> dict[str, float]:
        result = self._measured(n_batches)
        if not math.isfinite(loss := result["val_loss"]):
            raise Diverged(f"the validation loss is {loss:g}", self._setup.state.step)
        return result

    def _measured(self, n_batches: int) -> dict[str, float]:
        setup, options = self._setup, self._setup.options
        if self.preference is not None:
            return self.preference.evaluate(n_batches or None)
        parts = list(parts_of(setup.dataset))
        losses = []
        for part in parts:
            found = evaluate(
                setup.model,
                part.dataset,
                batch_size=options.batch_size,
                seq_len=options.seq_len,
                n_batches=n_batches or None,
                world=self._world,
            )
            losses.append(found.loss)
        if len(parts) == 1:
            return {"val_loss": found.loss, "val_bpb": found.bpb}
        loss = sum(part.weight * one for part, one in zip(parts, losses, strict=True))
        return {
            "val_loss": loss,
            "val_bpb": bits_per_byte(loss, setup.dataset, "val"),
            **{f"val_loss/{part.label}": one for part, one in zip(parts, losses, strict=True)},
        }

    def _rise(self, val_loss: float) -> str | None:
        """A note when the loss has risen past its best by a margin; once for each best."""
        state = self._setup.state
        if state.best_val_loss is None or val_loss <= RISE * state.best_val_loss:
            return None
        if self._rise_noted == (state.best_step or 0):
            return None
        self._rise_noted = state.best_step or 0
        kept = "" if state.best_step is None else f" at step {state.best_step:,}, which is kept"
        return (
            f"note: the validation loss has risen from {state.best_val_loss:.4f}{kept} to "
            f"{val_loss:.4f}: the model memorizes; more data, --dropout or a smaller model help, "
            "and --patience N ends such a run"
        )

    def sample(self, n_tokens: int | None = None) -> str:
        """A sample from the current model; for conversations, answers to held-out prompts.

        With `n_tokens`, a text of exactly so many tokens, as far as the context goes.
        """
        with self._setup.averaged():
            return self._sample(n_tokens)

    def _sample(self, n_tokens: int | None) -> str:
        setup = self._setup
        if self.held_out is not None:
            return self.held_out.text()
        ends = setup.tokenizer.specials if n_tokens else ()
        generation = Generation(
            setup.model,
            setup.tokenizer,
            "",
            max_tokens=n_tokens or SAMPLE_TOKENS,
            sampling=Sampling(
                temperature=SAMPLE_TEMPERATURE,
                seed=setup.options.seed,
                bias=tuple((token, -math.inf) for token in ends),
            ),
        )
        return "".join(piece for _, piece in generation).strip()

    @property
    def most_sampled(self) -> int:
        """The largest number of tokens of a sample that does not answer a prompt."""
        n_prompt = len(prompt_tokens(self._setup.tokenizer, ""))
        return min(SAMPLE_TOKENS, self._setup.model.config.block_size - n_prompt + 1)

    def sample_bytes(self) -> int:
        """Bytes that `sample` takes for its KV cache."""
        setup = self._setup
        if self.held_out is not None:
            size = min(setup.model.config.block_size, self.held_out.longest)
            return session_bytes(setup.model, 1, size)
        n_ctx = len(prompt_tokens(setup.tokenizer, "")) + self.most_sampled - 1
        return session_bytes(setup.model, 1, n_ctx)

    def measure_peak(self) -> None:
        """Remeasures the peak now and then: a shared machine may be slow at the start."""
        if time.monotonic() - self._peak_at > PEAK_EVERY_S:
            before = self.peak_flops
            self.peak_flops = max(before, self._setup.model.peak_flops() * self._setup.ranks)
            if self.peak_flops > 1.1 * before:
                self._show.note(
                    f"note: peak remeasured: {self.peak_flops / 1e9:,.0f} GFLOP/s; "
                    "MFU now refers to it"
                )
            self._peak_at = time.monotonic()

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOPs utilization: the model's arithmetic as a share of the machine's peak."""
        options, model = self._setup.options, self._setup.model
        plan, step = self._setup.plan, self._setup.state.step
        if self.n_steps and (cuts := self._growth.cuts(step - 1)) > 1:
            plan = plan_for(model.config, replace(model.options, max_seq=options.seq_len // cuts))
        flops_per_token = plan.train_flops_per_token + plan.update_flops / self._step_positions
        flops = flops_per_token * tokens_per_s
        return round(flops / self.peak_flops, 4)

    def report(self, meter: Meter, lr: float) -> StepReport:
        """The state of training for the display."""
        setup, state, options = self._setup, self._setup.state, self._setup.options
        rate = self.positions_per_step / meter.step_s
        return StepReport(
            step=state.step,
            steps=setup.horizon.steps,
            loss=meter.loss,
            bpb=None if options.dpo else bits_per_byte(meter.loss, setup.dataset, "train"),
            measures=dict(meter.measures),
            lr=lr,
            tokens_per_s=rate,
            mfu=self.mfu(rate),
            left_s=setup.horizon.left_s(state.step, meter.step_s),
        )


def _short(value: float) -> float:
    """The value rounded to 9 digits, which identify a float32."""
    return float(f"{value:.9g}")
