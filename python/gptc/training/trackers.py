"""Numbers and samples of a run for the programs of others: a row of TRACKERS for each.

    with open_trackers(["tensorboard"], "tiny-book", Path("runs/tiny-book"), {"lr": 1e-3}) as out:
        out.record({"step": 1, "train_loss": 5.5})

Packages are those of the user, imported when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from gptc.errors import GptcError
from gptc.files.words import pip_install
from gptc.training.curves import Curves

Numbers = Mapping[str, float]

_APART = ("step", "time")  # of a record: its place, and no number


class Writer(NamedTuple):
    """What a tracker does with a step's numbers, with a sample, and at the end."""

    numbers: Callable[[int, Numbers], object]
    text: Callable[[int, str], object]
    close: Callable[[], object]


class Tracker(NamedTuple):
    """A program that draws runs: packages, of which one is needed, and how to write for it."""

    packages: tuple[str, ...]
    open: Callable[[Any, str, Path, Mapping[str, Any]], Writer]


def _tensorboard(package: Any, name: str, folder: Path, options: Mapping[str, Any]) -> Writer:
    """Event files in the run's folder. Without tensorboardX, tensorboard has no text."""
    if hasattr(package, "SummaryWriter"):
        out = package.SummaryWriter(str(folder / "tensorboard"))
        add_text = out.add_text
    else:
        out = package.summary.Writer(str(folder / "tensorboard"))
        add_text = None

    def numbers(step: int, values: Numbers) -> None:
        for key, value in values.items():
            out.add_scalar(key, value, step)

    def text(step: int, sample: str) -> None:
        if add_text is not None:
            add_text("sample", sample, step)

    return Writer(numbers, text, out.close)


def _board(package: Any, name: str, folder: Path, options: Mapping[str, Any]) -> Writer:
    """A run of the project gptc, for programs with the interface of Weights & Biases."""
    run = package.init(project="gptc", name=name, config=dict(options))
    return Writer(
        lambda step, values: run.log(dict(values), step=step),
        lambda step, sample: run.log({"sample": sample}, step=step),
        run.finish,
    )


TRACKERS = {
    "tensorboard": Tracker(("tensorboardX", "tensorboard"), _tensorboard),
    "wandb": Tracker(("wandb",), _board),
    "trackio": Tracker(("trackio",), _board),
}


class Trackers:
    """The trackers of a run. One that fails is left out from then on: training continues."""

    def __init__(self, writers: dict[str, Writer], note: Callable[[str], object]) -> None:
        self._writers, self._note = writers, note
        self.complete: list[str] = []
        """After the end, the names of those that have got everything."""

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def record(self, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a record of metrics.jsonl."""
        values = {key: value for key, value in record.items() if key not in _APART}
        self._each(lambda writer: writer.numbers(record["step"], values))

    def sample(self, step: int, text: str) -> None:
        """Writes a sample."""
        self._each(lambda writer: writer.text(step, text))

    def close(self) -> None:
        """Ends each."""
        self._each(lambda writer: writer.close())
        self.complete += self._writers
        self._writers = {}

    def _each(self, call: Callable[[Writer], object]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                call(writer)
            except Exception as error:  # whatever a package of others raises
                del self._writers[name]
                self._note(f"note: {name} has failed ({_line(error)}): the run continues without")


def find_package(name: str) -> Any:
    """The module for a tracker. GptcError if none of its packages is installed."""
    packages = TRACKERS[name].packages
    for package in packages:
        try:
            found = import_module(package)
            if package == "tensorboard":
                import_module("tensorboard.summary")
            return found
        except ImportError:
            continue
        except Exception as error:  # a package that does not fit those it needs
            raise GptcError(f"--{name}: {package} cannot be imported: {_line(error)}") from error
    raise GptcError(f"--{name} needs {' or '.join(packages)}: {pip_install(packages[0])}")


def open_trackers(
    names: Sequence[str],
    run: str,
    folder: Path,
    options: Mapping[str, Any],
    note: Callable[[str], object],
) -> Trackers:
    """The trackers of these names, for a run in `folder`. GptcError for one that does not start."""
    writers = {}
    for name in names:
        package = find_package(name)
        try:
            writers[name] = TRACKERS[name].open(package, run, folder, options)
        except Exception as error:  # no login, no network
            raise GptcError(f"--{name} cannot start a run: {_line(error)}") from error
    return Trackers(writers, note)


def check_replay(run: Curves, names: Sequence[str]) -> None:
    """GptcError if a run has event files, in which each step would be there twice."""
    folder = run.folder / "tensorboard"
    if "tensorboard" in names and any(folder.glob("events.out.tfevents.*")):
        raise GptcError(
            f"{folder} has event files of this run already: remove that folder to write them again"
        )


def replay(run: Curves, names: Sequence[str], note: Callable[[str], object]) -> list[str]:
    """Writes a run that is there, step by step; returns the trackers that have all of it."""
    options = (run.trainer or {}).get("options", {})
    texts = [(sample["step"], sample["text"]) for sample in run.samples]
    with open_trackers(names, run.name, run.folder, options, note) as out:
        for record in run.records:
            out.record(record)
            while texts and texts[0][0] <= record["step"]:
                out.sample(*texts.pop(0))
    return out.complete


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
