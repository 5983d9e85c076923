"""The plan of a run, against the run itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.names import list_checkpoints
from gptc.cli.train import given_options
from gptc.engine.arrays import TokenArray
from gptc.engine.model import Model
from gptc.engine.options import plan_for
from gptc.errors import GptcError, UsageError
from gptc.files.words import amount
from gptc.training import horizon
from gptc.training import plan as planning
from gptc.training import setup as setting_up
from gptc.training.horizon import count_multiples, few_rows
from gptc.training.options import TrainOptions
from gptc.training.plan import Costs, Forecast, forecast
from gptc.training.progress import PlainProgress
from gptc.training.report import planned_bytes
from gptc.training.resolve import new_options
from gptc.training.run import train
from gptc.training.setup import Setup, set_up
from gptc.training.trainer import Trainer

Options = dict[str, Any]
Gptc = Callable[..., Any]
COSTS = Costs(
    first_s=1.0, pass_s=0.5, pass_positions=32.0, update_s=0.25, eval_s=0.125, save_s=2.0,
    last_save_s=4.0, sample_s=8.0,
)  # fmt: skip


@contextmanager
def _ready(options: Options) -> Iterator[Setup]:
    show = PlainProgress()
    setup = set_up(new_options(options), None, show)
    yield setup
    setup.close()


def _forecast(options: Options) -> Forecast:
    with _ready(options) as setup:
        folder = Path(options["out"])
        return forecast(setup, Trainer(setup, PlainProgress(), folder), folder)


def _measured(setup: Setup, options: Options) -> Costs:
    folder = Path(options["out"])
    return planning._measure(setup, Trainer(setup, PlainProgress(), folder), folder)


@pytest.fixture
def _costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known costs in place of measured ones."""
    monkeypatch.setattr(planning, "_measure", lambda setup, trainer, folder: COSTS)


@pytest.mark.usefixtures("_costs")
@pytest.mark.parametrize(
    "given",
    [{}, {"steps": 9, "grad_accum": 3, "save_every": 3}, {"eval_batches": 0, "sample_every": 3}],
)
def test_the_plan_is_what_a_run_then_does(
    options: Options, given: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "keep_last": 0, **given}
    found = _forecast(options)
    evaluated: list[int] = []
    from gptc import Model

    real = Model.loss
    monkeypatch.setattr(
        Model, "loss", lambda model, x, *rest: evaluated.append(len(x)) or real(model, x, *rest)
    )
    summary = train({**options, "lr": 1e-2})
    assert (found.steps, found.tokens) == (summary.step, summary.tokens)
    assert (found.n_params, found.engine_bytes) == (summary.n_params, summary.engine_bytes)
    assert found.planned_peak_bytes == pytest.approx(summary.planned_peak_bytes, rel=0.05)
    assert found.n_eval_batches == len(evaluated)
    assert found.n_saves == len(list_checkpoints(Path(options["out"])))
    step_s = 0.5 * options.get("grad_accum", 1) + 0.25
    assert found.step_s == step_s
    rest_s = found.n_eval_batches * 0.125 + found.n_saves * 2.0 + 2.0 + found.n_samples * 8.0
    assert found.seconds == found.start_s + 1.0 + found.steps * step_s + rest_s
    samples = Path(options["out"]) / "samples.jsonl"
    assert found.n_samples == len(samples.read_text().splitlines())
    lines = [json.loads(line) for line in (samples.parent / "metrics.jsonl").open()]
    assert lines[-1]["elapsed_s"] <= summary.elapsed_s  # the last evaluation and checkpoint too


@pytest.mark.usefixtures("_costs")
def test_flops_are_those_of_the_products(options: Options) -> None:
    found = _forecast({**options, "preset": "tiny"})
    with _ready(options) as setup:
        config = setup.model.config
        matrices = [
            shape
            for name, shape, _ in config.parameters()
            if len(shape) == 2 and (not name.startswith("wte") or config.tied)
        ]
    multiplied = sum(rows * columns for rows, columns in matrices)
    attention = config.n_layer * 2 * (options["seq_len"] / 2) * config.n_embd
    assert found.flops_per_token == 3 * 2 * (multiplied + attention)
    assert found.flops == found.flops_per_token * found.tokens


@pytest.mark.usefixtures("_costs")
@pytest.mark.parametrize("free", [20_000_000, 21_000_000, 29_000_000])
def test_the_largest_batch_fits_and_one_more_does_not(
    options: Options, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda: free)
    found = _forecast(options)
    assert found.largest_batch is not None
    with _ready({**options, "batch_size": found.largest_batch}) as setup:
        room = free + found.engine_bytes - setup.plan.library_bytes
        assert setup.plan.total_bytes <= room
    with _ready({**options, "batch_size": found.largest_batch + 1}) as setup:
        assert plan_for(setup.model.config, setup.model.options).total_bytes > room


def test_a_calibration_leaves_nothing(
    options: Options, gptc: Gptc, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(planning, "CALIBRATION_S", 0.0)
    folder = Path(options["out"]).parent
    before = sorted(folder.rglob("*"))
    found = json.loads(gptc("plan", *arguments, "--json").out)
    assert found["costs"].pop("first_s") >= 0
    assert all(value > 0 for value in found["costs"].values())
    shown = gptc("plan", *arguments).out
    assert "FLOPs per token" in shown
    assert "8 steps of" in shown
    assert sorted(folder.rglob("*")) == before


def test_the_head_of_a_run_and_the_plan_have_one_peak(
    options: Options, gptc: Gptc, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "CALIBRATION_S", 0.0)
    monkeypatch.setattr("gptc.training.setup.resident_bytes", lambda: 50_000_000)
    planned = gptc("plan", *arguments)
    ran = gptc("train", *arguments)
    (line,) = (line for line in planned.out.splitlines() if "at the peak" in line)
    assert line in ran.err.splitlines()
    found = json.loads(gptc("plan", *arguments, "--json").out)
    assert f"{amount(found['planned_peak_bytes'])} at the peak" in line


def test_samples_that_are_timed_do_not_end_early(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _ready(options) as setup:
        trainer = Trainer(setup, PlainProgress(), Path(options["out"]))
        trainer.step(lambda: None)
        end = setup.tokenizer.encode(trainer.sample(1))[0]  # what it would write
        whole = trainer.sample(8)
        monkeypatch.setattr(type(setup.tokenizer), "specials", frozenset({int(end)}))
        assert trainer.sample(8) != whole
        assert int(end) not in setup.tokenizer.encode(trainer.sample(8))
        assert trainer.most_sampled == setup.model.config.block_size


def test_a_sample_is_as_long_as_documents_are(options: Options) -> None:
    with _ready(options) as setup:
        trainer = Trainer(setup, PlainProgress(), Path(options["out"]))
        (source,) = setup.dataset.meta["sources"]
        n_tokens = sum(setup.dataset.n_tokens(split) for split in ("train", "val"))
        source["documents"] = n_tokens // 2  # of two tokens each, in the mean
        assert planning._sample_tokens(setup, trainer) == pytest.approx(2, rel=0.01)
        source["documents"] = 1
        most = trainer.most_sampled
        assert 0.9 * most < planning._sample_tokens(setup, trainer) <= most


def test_with_minutes_the_end_comes_after_the_time(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_measure", lambda setup, trainer, folder: COSTS)
    given = {**options, "minutes": 1.0, "eval_every": 10**6, "save_every": 10**6}
    found = _forecast({name: v for name, v in given.items() if name != "steps"})
    after_s = found.n_eval_batches * 0.125 + 4.0 + 8.0
    assert 58 < found.seconds - found.start_s - after_s <= 60.75


def test_with_minutes_all_lines_have_one_number_of_steps(
    gptc: Gptc, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_measure", lambda setup, trainer, folder: COSTS)
    first = arguments.index("--steps")
    del arguments[first : first + 2]
    given = [*arguments, "--minutes", "1", "--eval-every", "1000000", "--save-every", "1000000"]
    shown = gptc("plan", *given).out
    found = json.loads(gptc("plan", *given, "--json").out)
    n_steps = found["steps"]
    assert n_steps == found["options"]["steps"] > 1
    assert f"about {n_steps} of" in shown
    assert f"{n_steps} steps of" in shown


def test_preparation_is_not_in_the_time(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = setting_up.open_dataset

    def slow(*given: Any) -> Any:
        time.sleep(1.0)
        return real(*given)

    def already(*given: Any) -> Any:
        found = slow(*given)
        found[1].already_there = True
        return found

    with _ready(options):
        pass  # now everything is loaded
    monkeypatch.setattr(setting_up, "open_dataset", slow)
    with _ready(options) as setup:
        without_s = setup.seconds
    monkeypatch.setattr(setting_up, "open_dataset", already)
    with _ready(options) as setup:
        assert setup.seconds > without_s + 0.5


def test_a_checkpoint_is_timed_without_a_copy_where_a_run_makes_none(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _ready(options) as setup:
        folder = Path(options["out"])
        assert setup.has_copy()
        monkeypatch.setattr("gptc.engine.snapshot.available_bytes", lambda: setup.copy_bytes - 1)
        monkeypatch.setattr(planning, "Snapshot", None)  # none is made
        while_running, at_end = planning._save_s(setup, folder)
        assert while_running == at_end > 0
        planned = planned_bytes(setup, 0, 0)
        own = setup.copy_bytes
        setup.outer = object()  # type: ignore[assignment]  # ranks that train apart
        assert setup.copy_bytes == 0
        assert planned_bytes(setup, 0, 0) == planned - own


def test_a_run_with_one_checkpoint_is_planned_without_a_copy(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the calibration would be in the peak of this process."""
    with _ready({**options, "eval_every": 8, "save_every": 8}) as setup:
        assert setup.has_copy()
        monkeypatch.setattr(planning, "Snapshot", None)  # none is made
        while_running, at_end = planning._save_s(setup, Path(options["out"]))
        assert while_running == at_end > 0


def test_tokens_per_step_set_the_micro_batches(options: Options) -> None:
    given = {**options, "tokens_per_step": 70, "steps": 2, "eval_every": 2}  # of 2 x 16
    summary = train(given)
    assert (summary.options["grad_accum"], summary.tokens) == (3, 2 * 96)
    assert train({"tokens_per_step": 64, "steps": 3}, resume=options["out"]).tokens == 192 + 64


def test_auto_is_a_word_for_as_many_as_needed(
    options: Options, gptc: Gptc, arguments: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('grad-accum = "auto"\ntokens-per-step = "70"\n')
    ran = gptc("train", *arguments, "--steps", 2, "--config", file, "--json")
    assert json.loads(ran.out)["options"]["grad_accum"] == 3
    given = ["--steps", 2, "--grad-accum", "auto", "--out", tmp_path / "two", "--json"]
    ran = gptc("train", *arguments, *given, "--tokens-per-step", 70)
    assert json.loads(ran.out)["options"]["grad_accum"] == 3
    assert "auto needs --tokens-per-step" in gptc("train", *arguments, *given).err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens_per_step": 70, "grad_accum": 2}, "sets --grad-accum: leave out --grad-accum 2"),
        ({"grad_accum": 0}, "--grad-accum auto needs --tokens-per-step"),
        ({"tokens_per_step": 31}, "2 x 16 tokens is more: use --batch-size 1 or less"),
        ({"tokens_per_step": 2**30}, "tokens; it must be at most"),
    ],
)
def test_sizes_of_a_step_that_contradict(options: Options, given: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train({**options, **given})
    assert not Path(options["out"]).exists()


def test_the_head_of_a_run_has_its_flops(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(options)
    assert "FLOPs per token" in capsys.readouterr().err
    assert TrainOptions(**summary.options).step_tokens == 32


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (0, 24), (7, 25), (12, 36), (5, 4)])
@pytest.mark.parametrize(("every", "other"), [(1, 1), (4, 6), (5, 7), (100, 3)])
def test_steps_are_counted_as_they_come(first: int, last: int, every: int, other: int) -> None:
    steps = range(first + 1, last + 1)
    hits = [n for n in steps if n % every == 0 or n % other == 0 or n == last]
    assert count_multiples(first, last, every, other) == len(hits)
    assert count_multiples(0, 10**15, 1) == 10**15


def test_the_command_line_replaces_what_a_file_sets_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("grad_accum = 4\nwarmup_steps = 5\n")
    assert given_options(file, {"tokens_per_step": 64, "steps": None}) == {
        "warmup_steps": 5, "tokens_per_step": 64}  # fmt: skip
    file.write_text("warmup_share = 0.1\n")
    assert given_options(file, {"warmup_steps": 3}) == {"warmup_steps": 3}


def test_a_folder_that_cannot_be_written_is_named(options: Options, tmp_path: Path) -> None:
    with _ready(options) as setup, pytest.raises(GptcError, match="cannot write to /proc"):
        forecast(setup, Trainer(setup, PlainProgress(), tmp_path), Path("/proc/x"))


def test_the_pace_is_of_positions_that_there_are(options: Options) -> None:
    """Rows of conversations are as long as the longest of their batch, and not as --seq-len."""
    rows = [{"prompt": "ab", "completion": "c" * (1 + i % 5)} for i in range(40)]
    data = Path(options["out"]).parent / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    given = {**options, "data": str(data), "seq_len": 128, "tokenizer": "bytes"}
    found = _forecast(given)
    assert 0 < found.costs.pass_positions < 0.8 * found.step_tokens
    assert found.tokens == round(found.steps * found.costs.pass_positions)
    assert found.tokens_per_s == pytest.approx(found.costs.pass_positions / found.step_s)


def test_a_moment_of_other_work_does_not_count() -> None:
    values = [2.0] * 16 + [50.0, 0.1, 3.0, 1.0]
    kept = np.array(values)[planning.usual(values)]
    assert sorted(kept) == [2.0] * 16
    assert planning.usual([3.0, 9.0]).tolist() == [0, 1]
    assert planning.usual([9.0, 3.0, 4.0]).tolist() == [2]
    assert sorted(planning.usual([9.0, 3.0, 5.0, 1.0])) == [1, 2]


def _count_rows(monkeypatch: pytest.MonkeyPatch, model: Model, name: str, sizes: list[int]) -> None:
    """Each call of that method adds the rows of its batch to `sizes`."""
    real = getattr(model, name)

    def counted(x: TokenArray, *rest: Any, **more: Any) -> Any:
        sizes.append(len(x))
        return real(x, *rest, **more)

    monkeypatch.setattr(model, name, counted)


def test_a_long_pass_is_timed_by_a_part_of_its_rows(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "CALIBRATION_S", 0.0)
    monkeypatch.setattr(planning, "_timed", lambda call: 1.0 if call() is None else 0.0)
    monkeypatch.setattr(planning, "_AT_LEAST", 1)
    sizes: list[int] = []
    for longest_s, rows in (0.0, 1), (0.5, 2), (9.0, 4):
        monkeypatch.setattr(planning, "_TIMED_S", longest_s)
        sizes.clear()
        with _ready({**options, "batch_size": 4}) as setup:
            _count_rows(monkeypatch, setup.model, "backward", sizes)
            costs = _measured(setup, options)
            assert setup.loader.batch_size == 4
        assert sizes == [4, rows]
        assert costs.pass_positions == 4 * 16
        assert costs.pass_s == 4 / rows


def _row_flops(setup: Setup) -> float:
    return setup.plan.train_flops_per_token * setup.loader.seq_len


def test_a_pass_has_the_rows_that_a_second_has_time_for(options: Options) -> None:
    with _ready({**options, "batch_size": 4}) as setup:
        for seconds, n in (0.1, 1), (1.0, 1), (2.5, 2), (4.0, 4), (9.0, 4):
            assert few_rows(setup.loader, setup.plan, seconds * _row_flops(setup)) == n


def test_a_slow_machine_times_few_rows(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass has a whole batch where that takes minutes, and the times are in proportion."""
    monkeypatch.setattr(planning, "_timed", lambda call: (call(), 1.0)[1])
    sizes: list[int] = []
    with _ready({**options, "batch_size": 4}) as setup:
        setup.peak_flops = 2 * _row_flops(setup)
        for name in ("backward", "loss"):
            _count_rows(monkeypatch, setup.model, name, sizes)
        costs = _measured(setup, options)
        assert setup.loader.batch_size == 4
    assert set(sizes) == {1, 2}  # the first pass and those of an evaluation; the others
    assert (costs.pass_s, costs.eval_s) == (4.0, 2.0)


def test_minutes_are_planned_by_few_rows(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with _ready({**options, "batch_size": 4}) as setup:
        sizes: list[int] = []
        _count_rows(monkeypatch, setup.model, "backward", sizes)
        times = iter([0.0, 6.0])
        monkeypatch.setattr(horizon.time, "perf_counter", lambda: next(times))
        position = setup.loader.position
        assert horizon.time_step(setup.model, setup.loader, 3, 2) == 3.0 * 2 * 3
        assert sizes == [2, 2, 2]
        assert (setup.loader.position, setup.loader.batch_size) == (position, 4)


@pytest.mark.parametrize(("seconds", "n"), [(1.0, 3), (3.0, 1)])
def test_a_pass_is_timed_three_times_unless_it_is_very_long(
    options: Options, monkeypatch: pytest.MonkeyPatch, seconds: float, n: int
) -> None:
    clock = [0.0]

    def timed(call: Callable[[], object]) -> float:
        call()
        clock[0] += seconds
        return seconds

    monkeypatch.setattr(planning, "_timed", timed)
    monkeypatch.setattr(planning, "_eval_s", lambda setup: 0.0)
    monkeypatch.setattr(planning, "_save_s", lambda setup, folder: (0.0, 0.0))
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])
    done: list[int] = []
    with _ready(options) as setup:
        _count_rows(monkeypatch, setup.model, "backward", done)
        _measured(setup, options)
    assert len(done) == 1 + n


def test_what_is_cold_is_not_timed(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass and the first update find memory that no one has used."""
    done: list[str] = []

    def timed(call: Callable[[], object]) -> float:
        call()
        timed_at.append(len(done))
        return 100.0 if len(timed_at) == 1 else 1.0

    timed_at: list[int] = []
    monkeypatch.setattr(planning, "CALIBRATION_S", 0.0)
    monkeypatch.setattr(planning, "_timed", timed)
    monkeypatch.setattr(planning, "_TIMED_S", 1e3)
    with _ready(options) as setup:
        for name in ("backward", "update"):
            real = getattr(setup.model, name)
            monkeypatch.setattr(
                setup.model,
                name,
                lambda *given, _real=real, _name=name, **more: (
                    done.append(_name),
                    _real(*given, **more),
                )[1],
            )
        costs = _measured(setup, options)
    assert done[:4] == ["backward", "update", "backward", "update"]
    assert timed_at[:4] == [1, 2, 3, 4]  # the first says how many rows the others may have
    assert (costs.first_s, costs.pass_s, costs.update_s) == (99.0, 1.0, 1.0)
