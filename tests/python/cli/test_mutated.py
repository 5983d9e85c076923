"""A file of a checkpoint or run with a wrong type, value or bit is one line, or changes nothing.

The class of fault: a reader that trusts a file which another reader checks. So each mutation is
given to all four commands, and `verify` agrees with `infer` and `train --resume`.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptc.checkpoint.metrics import read_records
from gptc.checkpoint.names import list_checkpoints
from gptc.cli import run
from runs import sign

WRONG: list[Any] = [
    None, True, -1, 0, 1, 1.5, 2**63, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "0",
    "\ud800", "a\nb", "../x", [], [1], ["x"], [[]], {}, {"a": 1}, {"val_loss": "x"}, "x" * 5000,
]  # fmt: skip
CASES = int(os.environ.get("GPTC_TEST_MUTATIONS", "12"))  # of each kind of file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a tokenizer that was learned."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 400)
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--seq-len", "8"]
    sizes = ["--batch-size", "2", "--steps", "2", "--eval-every", "1", "--threads", "1"]
    given = ["--data", str(folder / "text.txt"), "--tokenizer", "bpe:300"]
    assert run(["train", *given, *shape, *sizes, "--out", str(folder / "run")]) == 0
    return folder / "run"


def commands(path: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The error of each command, "" for success; the resumed run comes last."""
    found = {}
    for name, arguments in {
        "info": ["info", str(path)],
        "verify": ["verify", str(path)],
        "infer": ["infer", "-m", str(path), "-p", "the", "--max-tokens", "2", "--threads", "1"],
        "resume": ["train", "--resume", str(path), "--steps", "3"],
    }.items():
        capfd.readouterr()
        code = run(arguments)
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("gptc: error:")]
        assert "error: unexpected" not in said, (name, said)
        assert "Traceback" not in said, (name, said)
        assert len(errors) == (code != 0), (name, code, said)
        found[name] = errors[0] if errors else ""
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON value; of a list, only of the first."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value))[:1] if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A content with another value, without one, with a flipped bit, or cut off."""
    kind = rng.choice(("value", "value", "value", "missing", "bit", "cut"))
    if kind == "bit":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    value = copy.deepcopy(json.loads(content))
    path = rng.choice(list(places(value)))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if kind == "missing":
        del parent[path[-1]]
    else:
        parent[path[-1]] = rng.choice(WRONG)
    return json.dumps(value).encode()


def remove(checkpoint: Path, name: str) -> None:
    sums = json.loads((checkpoint / "checksums.json").read_bytes())
    del sums["files"][name]
    (checkpoint / name).unlink()
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def assert_agreed(found: dict[str, str], case: object) -> None:
    """`verify` finds a fault if one of the loaders does, and only then.

    A flipped bit may give the path of other data, which is not a fault of the checkpoint.
    """
    other_data = found["resume"].startswith("gptc: error: no dataset ")
    loaders = found["infer"] or ("" if other_data else found["resume"])
    assert bool(found["verify"]) == bool(loaders), (case, found)


KINDS = ("trainer.json", "gptc_tokenizer.json", "config.json", "checksums.json", "tokenizer.json")


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_of_a_checkpoint(
    tmp_path: Path, whole: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = 0
    for case in range(CASES):
        rng = random.Random(f"{name} {case}")
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder, symlinks=True)
        for older in list_checkpoints(folder)[:-1]:
            shutil.rmtree(older)
        checkpoint = list_checkpoints(folder)[-1]
        content = mutated((checkpoint / name).read_bytes(), rng)
        (checkpoint / name).write_bytes(content)
        if name == "tokenizer.json":  # it is read where ours is missing
            remove(checkpoint, "gptc_tokenizer.json")
        if name != "checksums.json":
            sign(checkpoint / name)
        found = commands(folder, capfd)
        assert_agreed(found, (name, case, content[:300]))
        refused += bool(found["verify"])
        shutil.rmtree(folder)
    assert refused


TRAINER_FIELDS = (
    "step", "tokens", "elapsed_s", "best_val_loss", "best_step", "since_best", "evaluation",
    "loader_position", "threads", "device", "dtype", "cpu_level", "data_sha256", "options",
)  # fmt: skip


@pytest.mark.parametrize("field", TRAINER_FIELDS)
def test_a_wrong_type_in_trainer_json(
    tmp_path: Path, whole: Path, field: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    trainer = json.loads((checkpoint / "trainer.json").read_bytes())
    for value in (["x"], {"a": "b"}):
        (checkpoint / "trainer.json").write_text(json.dumps({**trainer, field: value}))
        sign(checkpoint / "trainer.json")
        found = commands(checkpoint, capfd)
        for name in ("verify", "resume"):
            assert f"{field} is" in found[name], found
        assert_agreed(found, value)


def test_a_damaged_line_of_metrics_stops_nothing(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)
    cases = (b"\xff" + first[1:], first[:9] + b"\n", b"[]\n", b'{"step": "x"}\n', b"\0\n")
    for damaged in cases:
        metrics.write_bytes(damaged + second)
        assert not any(commands(tmp_path / "run", capfd).values())
        kept = metrics.read_bytes()
        assert kept.startswith(damaged + second)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(whole, tmp_path / "run", symlinks=True)
    assert [record["step"] for record in read_records(metrics)] == [1, 2]


def test_a_damaged_tokenizer_is_never_skipped(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    (checkpoint / "gptc_tokenizer.json").write_text("{}")
    sign(checkpoint / "gptc_tokenizer.json")
    found = commands(checkpoint, capfd)
    for name in ("verify", "infer", "resume"):
        assert "gptc_tokenizer.json was altered" in found[name]
    capfd.readouterr()
    assert run(["info", str(checkpoint)]) == 0
    assert re.search(r"vocabulary .*not readable: .*was altered", capfd.readouterr().out)
    data = str(tmp_path / "x.txt")
    Path(data).write_text("words " * 999)
    init = ["--init-from", str(checkpoint), "--data", data, "--out", str(tmp_path / "b")]
    assert run(["train", *init, "--steps", "1"]) == 1
    assert "was altered" in capfd.readouterr().err
