"""A rank of a test's job, run by mpirun with the folder for its results and training options.

It trains, then makes one step by hand, whose sums the test knows; or it hangs, or joins again; or
it trains with a sharded state and by DiLoCo, and resumes such runs; or it runs commands.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

from gptc.checkpoint.names import checkpoint_name
from gptc.cli import run
from gptc.engine import world as world_module
from gptc.engine.launch import OPEN_MPI, launched, mpi_library
from gptc.engine.model import Model, Share, StepResult
from gptc.engine.optim import AdamW
from gptc.engine.world import World, join
from gptc.errors import GptcError
from gptc.training.run import train
from small_models import make_config

ADAMW = AdamW(1e-2)
B, T, N_MICRO = 2, 16, 4
N_CODED, N_CALLS = 3001, 3  # numbers of a sum in a shorter form, and sums


def new_model() -> Model:
    """The model of the step by hand, the same on all ranks."""
    return Model.create(
        make_config(), threads=1, max_batch=B, max_seq=T, seed=3, device="cpu", dropout=0.1
    )


def micro_batches(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a step, some of which are masked."""
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, model.config.vocab_size, (2, N_MICRO, B, T), dtype=np.int32)
    y[1, :, 3:] = y[3] = -1  # the last micro-batch has no target
    return x, y


def step_by_hand(world: World, out: Path) -> StepResult:
    """A step of all ranks; each writes its weights."""
    with new_model() as model:
        x, y = micro_batches(model)
        own = range(world.rank * N_MICRO // world.size, (world.rank + 1) * N_MICRO // world.size)
        share = Share(
            int((y >= 0).sum()),
            [(i, 0) for i in own],
            meet=lambda: world.add_gradients(model),
            begin=lambda: world.begin_gradients(model),
        )
        result = model.train_step(
            [x[i] for i in own], [y[i] for i in own], share=share, **vars(ADAMW)
        )
        np.savez(out / f"rank{world.rank}.npz", **model.parameters())
    return result


def hang(step: int, model: Model) -> None:
    """After a checkpoint rank 1 stops, and rank 0 does not wait for long."""
    if step == 5:
        join().set_timeout(0.5)
        if join().rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


def die(step: int, model: Model) -> None:
    """Rank 1 ends."""
    if step == 5 and join().rank == 1:
        os._exit(9)


def fail(step: int, model: Model) -> None:
    """Rank 1 has an error that no other rank knows of."""
    if step == 5 and join().rank == 1:
        raise GptcError("the disk is full")


ON_STEP = {"hang": hang, "die": die, "fail": fail, "fail apart": fail}


def begin_mpi() -> None:
    """Rank 0 alone begins MPI before it joins."""
    place = launched()
    assert place is not None
    if not place.rank:
        ctypes.CDLL(mpi_library(place.starter) or OPEN_MPI, mode=ctypes.RTLD_GLOBAL).MPI_Init(
            None, None
        )
    join(3)


def train_in_all_ways(out: Path, options: dict[str, object]) -> None:
    """Runs in these ways; all but those with a whole state also in two parts."""
    world = join()
    ways: dict[str, dict[str, object]] = {"whole": {}, "sharded": {"zero": 1}}
    ways["diloco"] = {"sync_every": options["save_every"]}
    ways["int8"] = {"wire": "int8"}
    ways["muon"] = {"optimizer": "muon", "muon_rows": True}
    ways["sharded-muon"] = {**ways["muon"], "zero": 1}
    for name, changes in ways.items():
        train({**options, **changes, "out": str(out / name)})
        if name not in ("whole", "muon"):
            part = out / f"{name}-in-parts"
            if not world.rank:
                first = checkpoint_name(int(str(options["save_every"])))
                shutil.copytree(out / name / first, part / first)
            world.gather(b"")  # it is there
            train({}, resume=part)


def add_coded(out: Path) -> None:
    """Sums of numbers that a test knows, in the shorter forms; with the size of a rank's slice."""
    world, found = join(), {}
    for wire in ("bf16", "int8"):
        residual = np.zeros(N_CODED, np.float32)
        for call in range(N_CALLS):
            values = coded_numbers(world.rank, call)
            world.add_coded(values, residual, wire)
            found[f"{wire}{call}"] = values
        found[wire] = residual
    np.savez(out / f"rank{world.rank}.npz", **found)


def coded_numbers(rank: int, call: int) -> np.ndarray:
    """Numbers of different sizes."""
    rng = np.random.default_rng([rank, call])
    sizes = np.exp(rng.normal(0, 3, N_CODED))
    return np.float32(rng.normal(0, 1, N_CODED) * sizes)


def run_commands(out: Path, commands: dict[str, list[str]]) -> None:
    """Runs commands by name; a rank writes the exit code and the output of each."""
    found = {}
    for name, arguments in commands.items():
        printed, complaints = io.StringIO(), io.StringIO()
        with redirect_stdout(printed), redirect_stderr(complaints):
            code = run(arguments)
        found[name] = [code, printed.getvalue(), complaints.getvalue()]
    (out / f"rank{join().rank}.json").write_text(json.dumps(found))


def main(out: Path, options: dict[str, object], what: str) -> None:
    """Trains; a rank writes its results, or hangs."""
    if what == "commands":
        run_commands(out, options)  # type: ignore[arg-type]
        return
    if what == "coded":
        add_coded(out)
        return
    if what == "ways":
        train_in_all_ways(out, options)
        return
    options = {**options, "out": str(out / "run")}
    if what == "fail apart":  # as if each rank had its own host
        World.host = lambda self, rank: f"host{rank}"  # type: ignore[method-assign]
    if what in ON_STEP:
        with errors_as_the_command_line():
            train(options, on_step=ON_STEP[what])
        return
    if what == "begun":
        with errors_as_the_command_line():
            begin_mpi()
        return
    if what == "again":
        join().leave()
        world_module._joined = None
        with errors_as_the_command_line():
            join()
        return
    world, summary = join(), train(options)
    found = {
        "step": step_by_hand(world, out),
        "val_loss": summary.val_loss,
        "saved": summary.checkpoint,
    }
    (out / f"rank{world.rank}.json").write_text(json.dumps(found))


@contextmanager
def errors_as_the_command_line() -> Iterator[None]:
    """Prints an error as the command line does."""
    try:
        yield
    except GptcError as error:
        if not error.silent:
            print(f"gptc: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
