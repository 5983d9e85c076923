"""Commands and options that import, export, verify, eval, info and doctor advise work as printed.

The class is that of test_advice.py: advice that cannot work. Each test types what it reads, with
CKPT, DIR, SOURCE and KIND filled in as a user would.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptc import Model
from gptc.bench.doctor import PACKAGES
from gptc.convert.export_model import export_model
from gptc.tokenizer.registry import make_tokenizer
from small_models import make_checkpoint, make_config

Gptc = Callable[..., Any]
FABLE = "The fox met a bear by the old oak, and both were hungry.\n" * 60


def advised(text: str, mark: str, **filled: object) -> list[list[str]]:
    """The arguments of the gptc commands after `mark`, to the end of its line or a semicolon."""
    assert mark in text, text
    words = shlex.split(re.split(r"[;\n]", text.partition(mark)[2])[0])
    words = [str(filled.get(word.rstrip(","), word)) for word in words]
    commands: list[list[str]] = [[]]
    for word in words:
        commands = [*commands, []] if word == "&&" else [*commands[:-1], [*commands[-1], word]]
    assert all(command[0] == "gptc" for command in commands)
    return [command[1:] for command in commands]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "my $data's"
    folder.mkdir()
    (folder / "a text.txt").write_text(FABLE)
    return folder


@pytest.fixture
def model_file(place: Path) -> Path:
    """A llama2.c file without a tokenizer next to it."""
    model = make_checkpoint(make_config("llama"), "", place / "original")
    export_model(model, "llama2.c", place / "a model.bin")
    return place / "a model.bin"


def runs(gptc: Gptc, command: list[str], *more: object) -> str:
    ran = gptc(*command, *more)
    assert ran.code == 0, ran.err
    return str(ran.out)


# ---- import ----


def test_import_names_the_next_command(gptc: Gptc, place: Path) -> None:
    model = make_checkpoint(make_config("llama"), "bytes", place / "original")
    ran = gptc("import", model.path, "--out", place / "a copy")
    (command,) = advised(ran.err, "next: ")
    assert command == ["infer", "-m", str(place / "a copy")]
    runs(gptc, command, "-p", "a", "--max-tokens", 3)


def test_import_without_a_tokenizer(gptc: Gptc, model_file: Path, place: Path) -> None:
    """No next command, which would fail; the note's command makes a model that writes text."""
    ran = gptc("import", model_file, "--out", place / "copy")
    assert ran.code == 0
    assert "next:" not in ran.err
    (command,) = advised(ran.err, "import it with: ", CKPT=place / "whole", KIND="bytes")
    runs(gptc, command)
    runs(gptc, ["infer", "-m", str(place / "whole")], "-p", "a", "--max-tokens", 3)


@pytest.mark.parametrize("command", ["infer", "verify"])
def test_a_model_file_without_a_tokenizer(
    gptc: Gptc, model_file: Path, place: Path, command: str
) -> None:
    ran = gptc("verify", model_file) if command == "verify" else gptc("infer", "-m", model_file)
    text = ran.out if command == "verify" else ran.err
    for advice in advised(text, "import it with: ", CKPT=place / "whole", KIND="bytes"):
        runs(gptc, advice)


# ---- export and verify ----


def test_an_export_of_infinite_numbers_names_the_check(gptc: Gptc, place: Path) -> None:
    config = make_config("llama")
    with Model.create(config, threads=1) as model:
        model.set("wte.weight", np.full((256, 32), np.nan, np.float32))
        model.save(place / "a model", make_tokenizer("bytes"))
    ran = gptc("export", "-m", place / "a model", "--to", "llama2.c", "--out", place / "x.bin")
    assert ran.code == 1
    (command,) = advised(ran.err, "look for the cause with: ")
    ran = gptc(*command)
    assert ran.code == 1
    assert "wte" in ran.err or "embed" in ran.err
    assert "finite" in ran.err


def test_an_export_replaces_as_advised(gptc: Gptc, saved: Path, place: Path) -> None:
    export = ["export", "-m", str(saved), "--to", "hf", "--out", str(place / "out")]
    runs(gptc, export)
    refused = gptc(*export).err
    assert "replace it with --force" in refused
    runs(gptc, export, "--force")


def test_verify_names_a_whole_checkpoint(gptc: Gptc, arguments: list[str], place: Path) -> None:
    run = place / "the run"
    arguments[arguments.index("--out") + 1] = str(run)
    runs(gptc, ["train", *arguments], "--save-every", 4)
    newest = max(run.glob("ckpt-*"))
    damaged = newest / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for command in (["verify", newest], ["infer", "-m", newest, "-p", "a"]):
        ran = gptc(*command)
        assert ran.code == 1
        other = ran.err.partition("; use ")[2].partition(" instead")[0]
        runs(gptc, ["verify", other])
    whole = gptc("verify", run).err.strip().partition("whole are: ")[2].split(", ")
    for name in whole:
        runs(gptc, ["verify", str(run / name)])


# ---- a path that is not a model ----


def test_a_model_that_does_not_exist(gptc: Gptc, arguments: list[str], place: Path) -> None:
    ran = gptc("export", "-m", place / "no model", "--to", "hf", "--out", place / "x")
    (command,) = advised(ran.err, "train a model with: ")
    del arguments[2:4]  # --out, which the advice has
    runs(gptc, command, *arguments)
    runs(gptc, ["info", str(place / "no model")])


def test_a_run_without_a_checkpoint(gptc: Gptc, arguments: list[str], place: Path) -> None:
    run = place / "the run"
    arguments[3] = str(run)
    runs(gptc, ["train", *arguments])
    for checkpoint in run.glob("ckpt-*"):
        shutil.rmtree(checkpoint)
    (run / "best").unlink()
    (command,) = advised(gptc("verify", run).err or gptc("infer", "-m", run).err, "with ")
    assert command[:2] == ["train", "--config"]
    runs(gptc, command)


def test_a_dataset_as_a_model(gptc: Gptc, arguments: list[str], place: Path) -> None:
    runs(gptc, ["prepare", str(place / "a text.txt")], "--out", place / "d", "--tokenizer", "bytes")
    ran = gptc("export", "-m", place / "d", "--to", "hf", "--out", place / "x")
    (command,) = advised(ran.err, "train on it with ")
    runs(gptc, command, *arguments[2:])


def test_a_folder_of_texts_as_a_dataset(gptc: Gptc, place: Path) -> None:
    from gptc.data.dataset import Dataset
    from gptc.errors import GptcError

    for folder, mark in ((place, "with "), (place / "none", "with ")):
        with pytest.raises(GptcError) as caught:
            Dataset.open(folder)
        (command,) = advised(str(caught.value), mark, DIR=place / "d", SOURCE=place / "a text.txt")
        runs(gptc, command, "--tokenizer", "bytes", "--force")


# ---- models and data that do not go together ----


def test_a_dataset_of_another_tokenizer(gptc: Gptc, place: Path, arguments: list[str]) -> None:
    """A checkpoint's tokenizer by its folder; that of a file after an import."""
    text, train = str(place / "a text.txt"), arguments[4:]
    runs(gptc, ["prepare", text], "--out", place / "bpe", "--tokenizer", "bpe:300")
    runs(gptc, ["train", "--data", str(place / "bpe"), "--out", str(place / "run"), *train])
    runs(gptc, ["prepare", text], "--out", place / "chars", "--tokenizer", "char")
    gguf = str(place / "a model.gguf")
    runs(gptc, ["export", "-m", str(place / "run"), "--to", "gguf", "--out", gguf])
    for i, model in enumerate((str(place / "run"), gguf)):
        ran = gptc("train", "--init-from", model, "--data", place / "chars", "--steps", 1)
        assert ran.code == 1
        filled = {"SOURCE": text, "DIR": place / f"d{i}", "CKPT": place / f"ckpt{i}"}
        for command in advised(ran.err, "with: ", **filled):
            runs(gptc, command)
        start = ["train", "--init-from", model, "--data", str(place / f"d{i}")]
        runs(gptc, start, "--steps", 1, "--out", place / f"tuned{i}", "--seq-len", 16)


def test_a_prepared_dataset_with_another_tokenizer(gptc: Gptc, place: Path) -> None:
    text = str(place / "a text.txt")
    runs(gptc, ["prepare", text], "--out", place / "d", "--tokenizer", "char")
    ran = gptc("train", "--data", place / "d", "--tokenizer", "bpe:300")
    (command,) = advised(ran.err, "again with: ", SOURCE=text, DIR=place / "other")
    runs(gptc, command)


def test_a_prompt_outside_the_alphabet(gptc: Gptc, place: Path, arguments: list[str]) -> None:
    """`gptc infer` has no --tokenizer: the advice is for training."""
    text, run = str(place / "a text.txt"), place / "the run"
    runs(gptc, ["train", "--data", text, "--tokenizer", "char"], *arguments[4:], "--out", run)
    ran = gptc("infer", "-m", run, "-p", "\u20ac")
    assert ran.code == 1
    assert "leave it out, or train with --tokenizer bytes" in ran.err


def test_a_text_as_a_model(gptc: Gptc, place: Path, arguments: list[str]) -> None:
    for ran in (gptc("infer", "-m", place / "a text.txt"), gptc("info", place / "a text.txt")):
        assert ran.code == 1
        (command,) = advised(ran.err, "train on it with ")
        assert command == ["train", "--data", str(place / "a text.txt")]
    runs(gptc, command, *arguments[4:], "--out", place / "run")


# ---- resuming ----


def test_resuming_what_cannot_be_resumed(gptc: Gptc, arguments: list[str], place: Path) -> None:
    """A model without a run, and a checkpoint that is not the newest: both by --init-from."""
    run, start = place / "the run", ["train", *arguments[:2], *arguments[14:]]
    arguments[3] = str(run)
    runs(gptc, ["train", *arguments], "--save-every", 4)
    runs(gptc, ["export", "-m", str(run), "--to", "hf", "--out", str(place / "a model")])
    oldest = min(run.glob("ckpt-*"))
    for i, given in enumerate((place / "a model", oldest)):
        ran = gptc("train", "--resume", given)
        assert ran.code in (1, 2)
        words = shlex.split(ran.err.partition("with ")[2].replace(", or", " , or"))
        weights = words[words.index("--init-from") + 1]
        runs(gptc, start, "--init-from", weights, "--out", place / f"new {i}")
        if "--resume" in words:
            again = words[words.index("--resume") + 1]
            runs(gptc, ["train", "--resume", again], "--steps", 10)


def test_a_folder_that_holds_a_run(gptc: Gptc, arguments: list[str], place: Path) -> None:
    arguments[3] = str(place / "the run")
    runs(gptc, ["train", *arguments])
    ran = gptc("train", *arguments)
    words = shlex.split(ran.err.partition("continue it with ")[2].partition(", or")[0])
    runs(gptc, ["train", *words], "--steps", 10)


# ---- eval ----


def test_a_split_that_is_too_short(gptc: Gptc, place: Path) -> None:
    (place / "short.txt").write_text("a fox and a bear. " * 4)
    make_checkpoint(make_config("byte"), "bytes", place / "m")
    ran = gptc("eval", "-m", place / "m", "--data", place / "short.txt")
    assert ran.code == 1
    words = ran.err.partition(": use ")[2].split()
    assert words[0] == "--seq-len"
    runs(gptc, ["eval", "-m", str(place / "m"), "--data", str(place / "short.txt")], *words[:2])


# ---- doctor ----


def test_doctor_names_packages_that_bring_what_is_missing(gptc: Gptc) -> None:
    """Each is the distribution of the module that gptc imports, where it is installed here."""
    modules = {"nvidia-cublas": "nvidia"}
    brought = importlib.metadata.packages_distributions()
    out = gptc("doctor").out
    for name, _ in PACKAGES:
        assert name in out
        module = modules.get(name, name)
        if module in brought:
            assert name in {distribution.lower() for distribution in brought[module]}


# ---- text files that cannot be read ----


@pytest.mark.parametrize(
    ("name", "content", "needed"),
    [
        ("a.jsonl", b'{"text": "a fox"}\n{"text": a bear}\n' * 50, ["--raw"]),
        ("b.jsonl", b'{"story": "a fox", "tale": "a bear"}\n' * 99, ["--text-field", "tale"]),
        ("c.csv", b"text,n\na fox,1\na bear,2,3\n" * 50, ["--raw"]),
        ("d.txt", b"a fox\xff and a bear\n" * 50, ["--errors", "replace"]),
    ],
)
def test_options_of_prepare_are_named_with_prepare(
    gptc: Gptc,
    arguments: list[str],
    place: Path,
    name: str,
    content: bytes,
    needed: list[str],
) -> None:
    """`gptc train --data FILE` lacks them; so does `gptc eval`."""
    file, tokenizer = place / name, ["--tokenizer", "char"]
    file.write_bytes(content)
    ran = gptc("train", *arguments[2:], "--data", file, *tokenizer)
    assert ran.code == 1
    assert needed[0] in ran.err
    (command,) = advised(ran.err, " of: ", DIR=place / "d")
    runs(gptc, command, *needed, *tokenizer)
    runs(gptc, ["train", "--data", str(place / "d")], *arguments[2:])


def test_options_of_train_are_not_said_to_be_others(
    gptc: Gptc, arguments: list[str], place: Path
) -> None:
    (place / "empty.txt").write_text("")
    ran = gptc("train", *arguments[2:], "--data", place / "empty.txt")
    assert ran.code == 1
    assert "gptc prepare" not in ran.err
