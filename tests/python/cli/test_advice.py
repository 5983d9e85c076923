"""Every command that gptc prints works as it is printed.

The class: advice that cannot work: a prompt outside the model's alphabet, a path that a shell cuts,
an option that the command lacks, a size that does not fit either. Each test types what it reads.
"""

from __future__ import annotations

import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc.errors import GptcError
from gptc.training.run import train
from processes import spawn

Gptc = Callable[..., Any]


def advised(text: str, mark: str) -> list[str]:
    """The arguments of the gptc command that follows `mark` in a line of `text`."""
    (line,) = [line for line in text.splitlines() if mark in line]
    words = shlex.split(line.partition(mark)[2])
    assert words[0] == "gptc"
    return words[1:]


TEXTS = {
    "greek": ("char", "η αλεπού και το δέντρο\n" * 60),
    "digits": ("char", "3 1 4 1 5\n" * 150),
    "one line": ("char", "abc" * 500),
    "quotes": ("char", 'it\'s "so" $HOME `x` \\ !\n' * 60),
    "dashes": ("bytes", "-- -m --help\n" * 100),
    "blank lines": ("bpe:260", "\n\n  \n fox and bear\n" * 80),
    "marks": ("bpe:270", "<|endoftext|>a fox\n<|endoftext|>a bear\n" * 60),
    "marks as text": ("bytes", "<|endoftext|>\na fox\n" * 60),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_next_command_works_with_any_text(
    gptc: Gptc, arguments: list[str], tmp_path: Path, name: str
) -> None:
    tokenizer, text = TEXTS[name]
    folder = tmp_path / "my $data's"
    folder.mkdir()
    (folder / "a text.txt").write_text(text)
    ran = gptc("prepare", folder / "a text.txt", "--out", folder / "d", "--tokenizer", tokenizer)
    run = folder / "the run"
    begin = advised(ran.out, "Next: ")
    assert begin == ["train", "--data", str(folder / "d")]
    options = arguments[2:]
    options[options.index("--out") + 1] = str(run)
    ran = gptc(*begin, *options)
    assert ran.code == 0, ran.err
    command = advised(ran.err, "next: ")
    prompt = command[command.index("-p") + 1]
    assert prompt
    assert prompt in text
    ran = gptc(*command, "--max-tokens", 3)
    assert ran.code == 0
    assert re.fullmatch(r"(seed \d+\n)?", ran.err)


def test_the_next_command_after_training_on_bytes_that_are_not_text(
    gptc: Gptc, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 20)
    ran = gptc("train", *arguments[2:], "--data", tmp_path / "x.bin")
    assert ran.code == 0, ran.err
    ran = gptc(*advised(ran.err, "next: "), "--max-tokens", 3)
    assert ran.code == 0
    assert re.fullmatch(r"(seed \d+\n)?", ran.err)


def test_the_next_command_names_the_best(
    gptc: Gptc, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptc.eval.loss import Evaluation

    losses = iter([1.0, 2.0])
    monkeypatch.setattr(
        "gptc.training.trainer.evaluate", lambda *_, **__: Evaluation(next(losses), 1.0, 1)
    )
    arguments[arguments.index("--out") + 1] = str(tmp_path / "a run")
    ran = gptc("train", *arguments)
    assert f"best val loss 1.0000 at step 4: {tmp_path / 'a run' / 'best'}\n" in ran.err
    command = advised(ran.err, "next: ")
    assert command[:3] == ["infer", "-m", str(tmp_path / "a run" / "best")]
    assert gptc(*command, "--max-tokens", 3).code == 0


def test_resuming_as_advised(gptc: Gptc, arguments: list[str], tmp_path: Path) -> None:
    """Interrupted; diverged, with a --min-lr above the advised rate; and past a limit."""
    run = tmp_path / "the run"
    arguments[arguments.index("--out") + 1] = str(run)
    arguments[arguments.index("--steps") + 1] = "100000"
    process = spawn("train", *arguments, "--log-every", 1, cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not ((run / "metrics.jsonl").exists() and list(run.glob("ckpt-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    resume = advised(err, "resume with: ")
    assert resume == ["train", "--resume", str(run)]
    steps = int(max(run.glob("ckpt-*")).name.removeprefix("ckpt-"))
    assert gptc(*resume, "--steps", steps + 1).code == 0
    past = gptc(*resume, "--tokens", 10).err
    more = shlex.split(past.partition("continue with ")[2])
    more[1] = str(steps + 2)
    assert gptc(*resume, *more).code == 0


@pytest.mark.filterwarnings("ignore:overflow")
def test_resuming_after_a_divergence_as_advised(
    gptc: Gptc, options: dict[str, Any], tmp_path: Path
) -> None:
    import numpy as np

    options["out"] = str(tmp_path / "the run")

    def poison(step: int, model: Any) -> None:
        if step == 6:
            model.set("wte.weight", np.full((256, 32), np.nan, np.float32))

    with pytest.raises(GptcError) as caught:
        train({**options, "lr": 1e-3, "min_lr": 9e-4}, on_step=poison)
    ran = gptc(*advised(str(caught.value), "continue from it with "))
    assert ran.code == 0, ran.err


# ---- what does not fit into memory ----


def test_a_run_that_does_not_fit_names_sizes_that_do(
    gptc: Gptc, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", arguments[1], "--preset", "tiny", "--steps", "1", "--device", "cpu"]
    arguments += ["--batch-size", "64", "--seq-len", "64", "--threads", "1"]
    for available in (60_000_000, 30_000_000, 20_000_000):
        monkeypatch.setattr("gptc.training.run_model.available_bytes", lambda n=available: n)
        ran = gptc("train", *arguments)
        assert ran.code == 1
        assert "are free; use --" in ran.err, ran.err
        words = ran.err.partition("; use ")[2].split()
        given = [word for word in words if not word.startswith("(") and word[-1] != ")"]
        assert gptc("train", *arguments, *given).code == 0


@pytest.mark.parametrize("sizes", [(), ("--batch-size", "1", "--seq-len", "16")])
def test_a_preset_whose_weights_alone_do_not_fit(
    gptc: Gptc,
    dataset_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[str, ...],
) -> None:
    monkeypatch.setattr("gptc.training.run_model.available_bytes", lambda: 150_000_000)
    begin = ["train", "--data", dataset_folder, "--steps", 1, *sizes]
    begin += ["--device", "cpu", "--dtype", "fp32", "--out", tmp_path / "run"]
    ran = gptc(*begin, "--preset", "gpt2-xl")
    assert ran.code == 1
    assert "its weights alone are too large: use --preset " in ran.err
    preset = ran.err.split()[-1]
    assert gptc(*begin, "--preset", preset).code == 0
    begin[-1] = tmp_path / "other"
    ran = gptc(*begin, "--preset", "gpt2-xl", "--n-head", 20)
    assert "use a smaller --n-layer or --n-embd" in ran.err
    smaller = ["--n-head", 20, "--n-layer", 1, "--n-embd", 40]
    assert gptc(*begin, "--preset", "gpt2-xl", *smaller).code == 0


@pytest.mark.parametrize("sizes", [(), ("--batch-size", "8", "--seq-len", "128")])
def test_where_no_preset_fits_with_its_usual_sizes(
    gptc: Gptc,
    dataset_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[str, ...],
) -> None:
    """The advice is the smallest preset with shorter sequences, then an amount of memory."""
    available = 12_000_000
    monkeypatch.setattr("gptc.training.run_model.available_bytes", lambda: available)
    begin = ["train", "--data", dataset_folder, "--steps", 1, "--device", "cpu", "--dtype", "fp32"]
    begin += ["--threads", 1, *sizes]
    ran = gptc(*begin, "--preset", "gpt2-xl", "--out", tmp_path / "run")
    assert ran.code == 1
    options = ran.err.partition("its weights alone are too large: use ")[2].split()
    assert options[:2] == ["--preset", "tiny"], ran.err
    assert gptc(*begin, *options, "--out", tmp_path / "run").code == 0

    for preset in ("gpt2-xl", "tiny"):
        available = 5_000_000
        ran = gptc(*begin, "--preset", preset, "--out", tmp_path / preset)
        assert ran.code == 1
        number, unit, _, *options = ran.err.partition("free memory, ")[2].split()
        assert (unit, options[:2]) == ("MB", ["--preset", "tiny"])
        for part, code in ((0.99, 1), (1.01, 0)):  # the number has three digits
            available = int(float(number) * 1e6 * part)
            assert gptc(*begin, *options, "--out", tmp_path / preset).code == code


def test_a_resumed_run_is_not_told_to_change_its_length(
    gptc: Gptc, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gptc("train", *arguments).code == 0
    monkeypatch.setattr("gptc.training.run_model.available_bytes", lambda: 1000)
    ran = gptc("train", "--resume", tmp_path / "run", "--steps", 9)
    assert "but 1.0 kB are free; free memory, or resume on a machine with more\n" in ran.err
