"""Processes that are killed at random while they train, save, replace a model or prepare text.

    python tools/attack/kills.py --kills 500

After each SIGKILL a whole model has to be there, one of those that were saved, and no older than
the newest before. The work is then begun again, as a user would, and killed again, until it ends.
A run's checkpoints and metrics, and a dataset's files, have to be those of work that nobody killed,
bit for bit. Most kills come while a folder is written: a process names its state in shared memory.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptc import GPTConfig, Model
from gptc.checkpoint import writer
from gptc.checkpoint.find import find_checkpoint, open_checkpoint
from gptc.checkpoint.metrics import read_records
from gptc.checkpoint.names import list_checkpoints
from gptc.convert.export_model import export_model
from gptc.data.dataset import Dataset
from gptc.data.preparation import prepare
from gptc.errors import GptcError
from gptc.files import whole
from gptc.settings import read_toml
from gptc.tokenizer.registry import make_tokenizer
from gptc.training import folder as run_folder
from gptc.training.options import TrainOptions
from gptc.training.run import train

Action = Callable[[], object]

_STEPS = 8
_SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16, "batch_size": 2, "threads": 1}
_CLOCK = ("elapsed_s", "time", "tokens_per_s", "mfu")
_SAVE_SECONDS = 0.03  # of a small checkpoint
_MOST_BEGINNINGS = 200  # of one work: a work that cannot end is a loss
_PATIENCE = 20  # beginnings, after which each has twice the time: others may use the machine

ELSEWHERE, SAVING, REPLACING, PREPARING = range(4)
STATES = ("elsewhere", "in saves", "in replacing saves", "in preparations")


class Failed(Exception):
    """Something was lost, or differs."""


class Attack:
    """Counts of kills by what the process was doing, and the failures."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.lost: list[str] = []
        self.differing: list[str] = []
        self._state = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def n_kills(self) -> int:
        return sum(self.kills.values())

    def run(self, action: Action, seconds: float, nth: int = 0) -> bool:
        """Runs an action in a process that is killed in up to `seconds`. True if it ended before.

        The seconds count from the beginning of the `nth` save.
        """
        self._state[0], self._state[1] = ELSEWHERE, 0
        child = os.fork()
        if not child:
            self._child(action)
        end = None
        while end is None or time.monotonic() < end:
            if end is None and self._state[1] >= nth:
                end = time.monotonic() + self.random.uniform(0, seconds)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return self._ended(status)
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            self.kills[STATES[self._state[0]]] += 1
            return False
        return self._ended(status)

    def _ended(self, status: int) -> bool:
        if status:
            raise Failed(f"the process ended with status {status}: see its traceback")
        return True

    def _child(self, action: Action) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        errors = os.dup(2)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        try:
            action()
            os._exit(0)
        except BaseException:
            os.write(errors, traceback.format_exc().encode())
            os._exit(1)

    def during(self, state: int, real: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, which names its state while it runs."""

        def named(*args: Any, **options: Any) -> Any:
            before, self._state[0] = self._state[0], state
            self._state[1] += 1
            try:
                return real(*args, **options)
            finally:
                self._state[0] = before

        return named

    def seconds_of(self, action: Action) -> float:
        """The time that an action takes in a process that nobody kills."""
        begin = time.monotonic()
        child = os.fork()
        if not child:
            self._child(action)
        self._ended(os.waitpid(child, 0)[1])
        return time.monotonic() - begin


# ---- runs ----


def options_of(text: Path, out: Path) -> dict[str, Any]:
    often = {"steps": _STEPS, "eval_every": 2, "save_every": 1, "keep_last": 2, "dropout": 0.1}
    return {"data": str(text), "tokenizer": "bytes", "out": str(out), **_SHAPE, **often}


def train_or_resume(options: dict[str, Any]) -> None:
    """What a user types after a kill: --resume, or the first command where nothing was saved."""
    out = Path(options["out"])
    if list_checkpoints(out):
        train({}, resume=out)
    else:
        train(options)


def newest_of(run: Path) -> int:
    """The step of the newest checkpoint, which must be whole; 0 without any."""
    if not list_checkpoints(run):
        return 0
    if "data" not in read_toml(TrainOptions, run / "config.toml"):
        raise Failed("config.toml is not whole")
    found = open_checkpoint(find_checkpoint(run))
    found.verify()  # type: ignore[attr-defined]
    found.tokenizer()
    return int(found.step)  # type: ignore[attr-defined]


def attack_run(attack: Attack, text: Path, folder: Path, expected: Path, seconds: float) -> None:
    """One run, killed until it ends; then it is compared with the one that was not."""
    run = folder / "run"
    options = options_of(text, run)
    newest = 0
    for n in range(_MOST_BEGINNINGS):
        more = 2 ** (n // _PATIENCE)
        if attack.random.random() < 0.2:  # anywhere
            ended = attack.run(partial(train_or_resume, options), more * seconds)
        else:
            nth = attack.random.choice((1, 1, 2, 3))
            ended = attack.run(partial(train_or_resume, options), more * _SAVE_SECONDS, nth)
        now = newest_of(run)
        if now < newest:
            raise Failed(f"step {newest} was saved, and the newest whole one is {now}")
        newest = now
        if ended:
            break
    else:
        raise Failed(f"{_MOST_BEGINNINGS} beginnings do not end it")
    last = f"ckpt-{_STEPS:06}"
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        if not filecmp.cmp(run / last / name, expected / last / name, shallow=False):
            attack.differing.append(f"{name} of a run that was killed")
    if metrics_of(run) != metrics_of(expected):
        attack.differing.append("metrics of a run that was killed")
    attack.lost += [f"a run leaves {left}" for left in left_in(run)]


def left_in(folder: Path) -> list[str]:
    """Temporary files and folders. Empty folders are removed: those not marked yet, or no more."""
    found = []
    for path in folder.glob(".*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        else:
            found.append(path.name)
    return found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what depends on the clock."""
    records = read_records(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in _CLOCK} for record in records]


# ---- models that are replaced ----


def forever(actions: list[Action]) -> None:
    while True:
        for action in actions:
            action()


def attack_replacing(attack: Attack, folder: Path, exported: bool, exchanges: bool) -> None:
    """A model that is replaced by another again and again; one kill."""
    path, sources = folder / "model", [folder.parent / "one", folder.parent / "two"]
    known = [(source / "model.safetensors").read_bytes() for source in sources]
    if not path.exists():
        shutil.copytree(sources[0], path)

    def replace(source: Path) -> None:
        if not exchanges:
            whole._exchange = lambda one, other: False  # type: ignore[assignment]
        model = open_checkpoint(source)
        if exported:
            export_model(model, "hf", path, replace=True)
        else:
            writer.save(path, model, tokenizer=model.tokenizer(), replace=True)

    replaced = [attack.during(REPLACING, partial(replace, source)) for source in sources]
    attack.run(partial(forever, replaced), 0.3)
    found = open_checkpoint(path)
    found.verify()  # type: ignore[attr-defined]
    found.tokenizer()
    if (path / "model.safetensors").read_bytes() not in known:
        raise Failed("a model that was replaced is neither the old one nor the new one")
    whole.clean_up(folder)
    attack.lost += [f"a replacing save leaves {left}" for left in left_in(folder)]


# ---- datasets ----


def attack_prepare(
    attack: Attack, text: Path, folder: Path, expected: Path, seconds: float, force: bool
) -> None:
    """One preparation, killed until it ends, over another dataset with `force`."""
    out = folder / "dataset"
    if force:
        prepare([str(text)], out, tokenizer="bytes", shard_tokens=50_000)
    before = text.read_bytes()
    action = attack.during(PREPARING, partial(prepare_again, text, out))
    for n in range(_MOST_BEGINNINGS):
        if attack.run(action, seconds * 2 ** (n // _PATIENCE)):
            break
        if text.read_bytes() != before:
            raise Failed("a source was changed")
    else:
        raise Failed(f"{_MOST_BEGINNINGS} beginnings do not end it")
    Dataset.open(out).verify()
    names = sorted(path.name for path in expected.iterdir())
    if sorted(path.name for path in out.iterdir()) != names:
        attack.differing.append(f"a dataset has {sorted(path.name for path in out.iterdir())}")
    for name in names:
        if not filecmp.cmp(out / name, expected / name, shallow=False):
            attack.differing.append(f"{name} of a dataset whose preparation was killed")


def prepare_again(text: Path, out: Path) -> None:
    prepare([str(text)], out, force=True, tokenizer="bpe:300", shard_tokens=10_000, jobs=1)


# ---- all ----


def make_models(folder: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        config = GPTConfig.preset(
            "tiny", vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=16
        )
        with Model.create(config, threads=1, seed=seed, training=False) as model:
            model.save(folder / name, make_tokenizer("bytes"))


def attack_all(n_kills: int, seed: int, folder: Path) -> Attack:
    """Kills in turn: two fifths replacing saves, two fifths runs, one fifth preparations.

    There are more than `n_kills` if none has hit a save, a replacing save or a preparation.
    """
    attack = Attack(seed)
    run_folder.save = attack.during(SAVING, run_folder.save)
    rng = np.random.default_rng(seed)
    words = [bytes(rng.integers(97, 123, n).astype(np.uint8)) for n in rng.integers(2, 9, 500)]
    text = folder / "text.txt"
    text.write_bytes(b" ".join(words[i] for i in rng.integers(0, 500, 60_000)))
    child = os.fork()  # libraries' threads must not be started here, whence all others are forked
    if not child:
        attack._child(partial(make_models, folder))
    attack._ended(os.waitpid(child, 0)[1])
    attack.seconds_of(partial(train, options_of(text, folder / "expected-run")))
    seconds = attack.seconds_of(partial(train, options_of(text, folder / "a-run")))
    prepared = attack.seconds_of(partial(prepare_again, text, folder / "expected"))
    turn = 0

    def is_done() -> bool:
        return attack.n_kills >= n_kills and all(map(attack.kills.get, STATES[1:]))

    while not is_done() and turn < n_kills:
        begin, place = attack.n_kills, folder / "work"
        place.mkdir()
        try:
            kind = turn % 5
            if kind < 2:
                while attack.n_kills < min(n_kills, begin + 10):
                    attack_replacing(attack, place, kind == 1, attack.random.random() < 0.7)
            elif kind < 4:
                attack_run(attack, text, place, folder / "expected-run", seconds / 2)
            else:
                even = turn % 2 == 0
                attack_prepare(attack, text, place, folder / "expected", prepared, even)
        except (Failed, GptcError, OSError) as error:
            attack.lost.append(f"turn {turn}: {type(error).__name__}: {error}")
            traceback.print_exc()
            kept = Path(tempfile.mkdtemp(prefix="kills-"))
            shutil.copytree(place, kept / "work", symlinks=True)
            print(f"kept: {kept}", file=sys.stderr)
        shutil.rmtree(place)
        turn += 1
        print(f"{attack.n_kills} kills: {json.dumps(attack.kills)}", flush=True)
    return attack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = attack_all(options.kills, options.seed, Path(folder))
    for line in (attack.lost + attack.differing)[:20]:
        print(line, file=sys.stderr)
    where = ", ".join(f"{attack.kills[state]} {state}" for state in STATES)
    result = f"{len(attack.lost)} lost, {len(attack.differing)} differing"
    print(f"{attack.n_kills} kills ({where}): {result}")
    return 1 if attack.lost or attack.differing else 0


if __name__ == "__main__":
    sys.exit(main())
