"""The optimizer's state of a run of two ranks, damaged: `verify` and `--resume` say it in one line.

With --zero 1 each rank has a part, which a checkpoint has as a whole; with --sync-every and --wire
it has tensors of each rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc.checkpoint.find import find_checkpoint
from gptc.checkpoint.names import list_checkpoints
from gptc.engine.arrays import FloatArray
from gptc.errors import GptcError
from gptc.formats.safetensors import TensorFile, tensor_chunks
from gptc.training.run import train
from mpi_jobs import connected_job
from runs import sign

STATE = "optimizer.safetensors"
Tensors = dict[str, FloatArray]
WAYS: dict[str, dict[str, Any]] = {
    "zero": {"zero": 1},
    "apart": {"sync_every": 2},
    "wire": {"wire": "int8"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(way) is a run of two ranks; one job makes them all."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    options = {
        "data": str(text), "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 16,
        "seq_len": 8, "batch_size": 2, "steps": 2, "eval_every": 2, "threads": 1, "device": "cpu",
        "dtype": "fp32",
    }  # fmt: skip
    commands = {
        way: ["train", *as_arguments({**options, **changes, "out": folder / way})]
        for way, changes in WAYS.items()
    }
    for found in outcomes(commands, folder):
        for code, _, said in found.values():
            assert code == 0, said
    return lambda way: folder / way


def as_arguments(options: dict[str, Any]) -> list[str]:
    return [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def outcomes(commands: dict[str, list[str]], folder: Path) -> list[dict[str, Any]]:
    """The exit code and the output of each command, of two ranks."""
    codes, errors = connected_job(folder, commands, "commands")
    assert codes == [0, 0], errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def changed(run: Path, folder: Path, change: Callable[[Tensors], object], **trainer: Any) -> Path:
    """A copy of a run whose state, and trainer.json, have other values and right checksums."""
    copy = folder / "copy"
    shutil.copytree(run, copy, symlinks=True)
    checkpoint = list_checkpoints(copy)[-1]
    file = TensorFile(checkpoint / STATE)
    tensors = {name: file.read(name).copy() for name in file.shapes}
    change(tensors)
    shapes = {name: values.shape for name, values in tensors.items()}
    (checkpoint / STATE).write_bytes(b"".join(tensor_chunks(shapes, tensors.__getitem__)))
    kept = json.loads((checkpoint / "trainer.json").read_bytes())
    (checkpoint / "trainer.json").write_text(json.dumps(kept | trainer))
    for name in (STATE, "trainer.json"):
        sign(checkpoint / name)
    return copy


def resumed(runs: dict[str, Path], folder: Path) -> dict[str, str]:
    """The only error of two ranks that resume each run, or ""."""
    commands = {way: ["train", "--resume", str(run), "--steps", "3"] for way, run in runs.items()}
    errors: dict[str, list[str]] = {way: [] for way in runs}
    for found in outcomes(commands, folder):
        for way, (code, _, said) in found.items():
            assert "Traceback" not in said
            lines = [line for line in said.splitlines() if line.startswith("gptc: error: ")]
            assert code or not lines
            errors[way] += lines
    assert all(len(lines) <= 1 for lines in errors.values()), errors
    return {way: "".join(lines) for way, lines in errors.items()}


def shaped(*names: str) -> Callable[[Tensors], object]:
    return lambda state: state.update({name: np.zeros(3, np.float32) for name in names})


NAME = "h.0.attn.qkv.weight"


def test_a_wrong_shape_of_a_rank_is_one_line(
    made: Callable[[str], Path], tmp_path: Path, gptc: Any
) -> None:
    wrong = {
        "zero": f"v.{NAME}", "apart": f"rank1.m.{NAME}", "wire": f"rank1.residual.{NAME}",
    }  # fmt: skip
    runs = {}
    for way, stored in wrong.items():
        (tmp_path / way).mkdir()
        runs[way] = changed(made(way), tmp_path / way, shaped(stored))
        verified = gptc("verify", runs[way])
        assert verified.code == 1
        assert f"{STATE} has {stored} with the shape (3,), not (" in verified.err
        assert gptc("info", runs[way]).code == 0
    errors = resumed(runs, tmp_path)
    for way, stored in wrong.items():
        assert STATE in errors[way]
        assert stored in errors[way]


@pytest.mark.parametrize("stored", [f"m.{NAME}", f"v.{NAME}"])
def test_a_state_that_is_missing_is_one_line(
    made: Callable[[str], Path], tmp_path: Path, gptc: Any, stored: str
) -> None:
    run = changed(made("zero"), tmp_path, lambda state: state.pop(stored))
    verified = gptc("verify", run)
    assert f"{STATE} lacks the optimizer's state of {NAME}" in verified.err
    with pytest.raises(GptcError, match=f"{STATE} lacks {stored} with the shape"):
        train({"steps": 3}, resume=run)


@pytest.mark.parametrize("n_bytes", [0, 7, 300, -4])
def test_a_state_that_is_cut_is_one_line(
    made: Callable[[str], Path], tmp_path: Path, gptc: Any, n_bytes: int
) -> None:
    run = changed(made("zero"), tmp_path, lambda state: None)
    path = find_checkpoint(run) / STATE
    path.write_bytes(path.read_bytes()[:n_bytes])
    sign(path)
    for arguments in (["verify", run], ["train", "--resume", run, "--steps", "3"]):
        ran = gptc(*arguments)
        assert ran.code == 1
        (line,) = (line for line in ran.err.splitlines() if line.startswith("gptc: error: "))
        assert STATE in line


@pytest.mark.parametrize("ranks", [1, 3, 2**61])
def test_one_process_resumes_ranks_of_any_number(
    made: Callable[[str], Path], tmp_path: Path, ranks: int
) -> None:
    run = changed(made("apart"), tmp_path, lambda state: None, ranks=ranks)
    assert train({"steps": 4}, resume=run).step == 4


def test_own_weights_of_another_shape_are_refused(
    options: dict[str, Any], tmp_path: Path, gptc: Any
) -> None:
    """A run with --ema would continue with its average in their place."""
    train({**options, "steps": 2, "ema": 0.9})
    run = changed(Path(options["out"]), tmp_path, shaped(f"own.{NAME}"))
    assert f"own.{NAME} with the shape (3,)" in gptc("verify", run).err
    with pytest.raises(GptcError, match=r"own\.h\.0.* with the shape \(3,\)"):
        train({"steps": 3}, resume=run)


def test_a_missing_average_of_rows_is_refused(
    options: dict[str, Any], tmp_path: Path, gptc: Any
) -> None:
    train({**options, "steps": 2, "optimizer": "muon", "muon_rows": True})
    run = changed(Path(options["out"]), tmp_path, lambda state: state.pop(f"rows.{NAME}"))
    assert f"lacks the optimizer's state of {NAME}" in gptc("verify", run).err
    with pytest.raises(GptcError, match=f"lacks rows.{NAME}"):
        train({"steps": 3}, resume=run)
