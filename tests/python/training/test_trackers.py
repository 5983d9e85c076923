"""Programs of others get a run's numbers and samples, and cannot end it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptc.errors import GptcError
from gptc.training.options import TRACKED
from gptc.training.run import train
from gptc.training.trackers import TRACKERS, find_package, open_trackers
from runs import metrics

Options = dict[str, Any]
Gptc = Callable[..., Any]


class Board(ModuleType):
    """The interface of wandb and trackio; keeps what it gets."""

    def __init__(self) -> None:
        super().__init__("board")
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.n_finished = 0
        self.fails_at = -1

    def init(self, **given: Any) -> Board:
        self.started = given
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise RuntimeError("no network\nat all")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.n_finished += 1


class Events(ModuleType):
    """The interface of tensorboardX."""

    def __init__(self) -> None:
        super().__init__("events")
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.folder = ""

    def SummaryWriter(self, folder: str) -> Events:
        self.folder = folder
        return self

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def close(self) -> None:
        pass


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    made = Board()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_each_is_an_option() -> None:
    assert tuple(TRACKERS) == TRACKED


def test_a_board_gets_each_record_and_the_samples(options: Options, board: Board) -> None:
    train({**options, "wandb": True, "sample_every": 5})
    assert board.started["project"] == "gptc"
    assert board.started["name"] == "run"
    assert board.started["config"]["n_embd"] == 32
    assert board.n_finished == 1
    numbers = [(step, values) for step, values in board.logged if "sample" not in values]
    lines = metrics(options["out"])
    assert [step for step, _ in numbers] == list(range(1, 9))
    for line, (_, values) in zip(lines, numbers, strict=True):
        apart = {k: v for k, v in line.items() if k not in ("step", "time")}
        assert apart == values
    assert [step for step, values in board.logged if "sample" in values] == [5, 8]


def test_event_files_are_in_the_folder_of_the_run(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events()
    monkeypatch.setitem(sys.modules, "tensorboardX", events)
    train({**options, "tensorboard": True})
    assert events.folder == str(Path(options["out"]) / "tensorboard")
    losses = [(step, value) for tag, value, step in events.scalars if tag == "train_loss"]
    assert losses == [(line["step"], line["train_loss"]) for line in metrics(options["out"])]
    assert [(tag, step) for tag, _, step in events.texts] == [("sample", 8)]


@pytest.mark.usefixtures("one_panel")
def test_a_run_with_event_files_is_not_written_twice(
    gptc: Gptc, arguments: list[str], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", Events())
    assert gptc("train", *arguments).code == 0
    out = Path(options["out"])
    command = ("plot", out, "--tensorboard", "--out", out / "x.png")
    written = gptc(*command)
    assert (written.code, written.out.splitlines()) == (
        0,
        [f"wrote {out / 'x.png'}", f"wrote {out / 'tensorboard'}"],
    )
    (out / "tensorboard").mkdir()
    (out / "tensorboard" / "events.out.tfevents.1.here").touch()
    (out / "x.png").unlink()
    again = gptc(*command)
    assert again.code == 1
    assert f"{out / 'tensorboard'} has event files of this run already: remove" in again.err
    assert not (out / "x.png").exists()
    assert gptc("plot", out, "--out", out / "x.png").code == 0


def test_a_board_that_fails_is_left_out_and_training_continues(
    options: Options, board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    board.fails_at = 3
    assert train({**options, "wandb": True}).finished
    assert [step for step, _ in board.logged] == [1, 2]
    notes = [line for line in capsys.readouterr().err.splitlines() if "wandb has failed" in line]
    assert notes == [
        "note: wandb has failed (RuntimeError: no network at all): the run continues without"
    ]


def test_what_is_missing_is_one_line_before_any_work(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboardX", "tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in TRACKERS:
        with pytest.raises(GptcError, match=f"--{name} needs .*{name}.*: .*pip.* install {name}"):
            train({**options, name: True})
        assert not Path(options["out"]).exists()


def test_a_board_that_does_not_start_is_one_line(tmp_path: Path, board: Board) -> None:
    board.init = None  # type: ignore[method-assign, assignment]
    with pytest.raises(GptcError, match="--wandb cannot start a run: TypeError"):
        open_trackers(["wandb"], "run", tmp_path, {}, print)


@pytest.mark.usefixtures("one_panel")
def test_a_run_that_is_there_is_sent_in_the_order_of_its_steps(
    gptc: Gptc, arguments: list[str], options: Options, board: Board
) -> None:
    assert gptc("train", *arguments, "--sample-every", 3).code == 0
    command = ("plot", options["out"], "--wandb", "--out", options["out"] + "/x.png")
    assert gptc(*command).out.splitlines() == [f"wrote {command[-1]}", "sent run to wandb"]
    board.fails_at = 3
    failed = gptc(*command)
    assert (failed.code, failed.out.splitlines()) == (0, [f"wrote {command[-1]}"])
    assert "wandb has failed" in failed.err
    del board.logged[[step for step, _ in board.logged].index(8) + 2 :]
    steps = [step for step, _ in board.logged]
    assert steps == sorted(steps)
    assert [step for step, values in board.logged if "sample" in values] == [3, 6, 8]
    assert [step for step, values in board.logged if "train_loss" in values] == list(range(1, 9))


@pytest.mark.clients
def test_tensorboardx_writes_what_it_is_given(options: Options) -> None:
    """pip install tensorboardX"""
    find_package("tensorboard")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    train({**options, "tensorboard": True})
    (file,) = (Path(options["out"]) / "tensorboard").iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "lr"]
    lines = metrics(options["out"])
    assert [step for step, _ in found] == [line["step"] for line in lines]
    assert [rate for _, rate in found] == pytest.approx([line["lr"] for line in lines])
