"""`gptc infer` prints prompt and text, as text, JSON or raw bytes.

The class: an option that does less than its name says, and a result that cannot be repeated.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptc import Model
from gptc.engine import library
from gptc.generation.decoder import Generation, generate
from gptc.generation.options import Sampling
from gptc.tokenizer.base import Tokenizer

# ---- one prompt ----


def test_infer_prints_prompt_and_text(
    gptc: Callable[..., Any], saved: Path, writer: Model, tokenizer: Tokenizer
) -> None:
    common = ("infer", "-m", saved, "--dtype", "fp32", "--threads", 1)
    ran = gptc(*common, "-p", "Once", "--seed", 4, "--max-tokens", 20)
    expected = generate(writer, tokenizer, "Once", seed=4, max_tokens=20)[0]
    assert (ran.code, ran.out) == (0, f"Once{expected}\n")
    assert ran.err == ""  # speed is for terminals


def test_the_continuation_alone(gptc: Callable[..., Any], saved: Path) -> None:
    common = ("infer", "-m", saved, "-p", "Once", "--seed", 4, "--max-tokens", 20)
    whole = gptc(*common).out
    assert gptc(*common, "--no-echo").out == whole.removeprefix("Once")
    ran = gptc(*common, "--no-echo", "--json")
    assert (ran.code, ran.err.splitlines()[0]) == (
        2,
        "gptc: error: --no-echo and --json or --prompts exclude each other: give one of them",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("infer", "--device", "cuda"), "no GPU is here"),
        (("infer", "--chat", "--device", "cuda"), "no GPU is here"),
        (("eval", "--device", "cuda"), "no GPU is here"),
        (("eval", "--task", "stories", "--device", "cuda"), "no GPU is here"),
        (("serve", "--device", "cuda"), "no GPU is here"),
        (("infer", "--stop", ""), "a stop string is empty: leave it out"),
        (("infer", "--chat", "--stop", ""), "a stop string is empty: leave it out"),
    ],
)
def test_options_are_checked_before_the_model_is_read(
    gptc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    arguments: tuple[str, ...], says: str,
) -> None:  # fmt: skip
    """A large vocabulary alone takes seconds."""
    missing = library.gpu()._replace(problem="no GPU is here")
    monkeypatch.setattr(library, "gpu", lambda: missing)
    if arguments[0] == "serve":
        pytest.importorskip("starlette", reason="pip install '.[serve]'")
    ran = gptc(*arguments, "-m", tmp_path / "nothing")
    assert ran.code in (1, 2)
    assert says in ran.err


def test_stop_strings_may_hold_a_line_end(gptc: Callable[..., Any], saved: Path) -> None:
    common = ("infer", "-m", saved, "-p", "Once", "--max-tokens", 300, "--temperature", 3)
    for seed in range(20):
        whole = gptc(*common, "--no-echo", "--seed", seed).out.removesuffix("\n")
        if "\n" in whole:
            break
    assert "\n" in whole
    ran = gptc(*common, "--no-echo", "--seed", seed, "--stop", "\\n")
    assert ran.out == whole[: whole.index("\n") + 1]


def test_a_drawn_seed_is_told(gptc: Callable[..., Any], saved: Path) -> None:
    common = ("infer", "-m", saved, "-p", "Once", "--max-tokens", 20)
    ran = gptc(*common)
    word, seed = ran.err.split()
    assert word == "seed"
    assert gptc(*common, "--seed", seed).out == ran.out
    assert gptc(*common, "--temperature", 0).err == ""


def test_infer_json_holds_every_sample(gptc: Callable[..., Any], saved: Path) -> None:
    common = ("infer", "-m", saved, "-p", "a", "--seed", 4, "--max-tokens", 6, "--threads", 1)
    ran = gptc(*common, "--num-samples", 2, "--json")
    result = json.loads(ran.out)
    assert result["prompt"] == "a"
    assert [s["finish"] for s in result["samples"]] == ["length", "length"]
    plain = gptc(*common, "--num-samples", 2).out
    for i, sample in enumerate(result["samples"]):
        assert f"--- sample {i + 1} ---\na{sample['text']}\n" in plain


@pytest.mark.parametrize("text", ["from a pipe", "two\nlines\n"])
def test_infer_reads_a_prompt_from_files_and_pipes(
    gptc: Callable[..., Any],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(text, "utf-8-sig")  # an editor's byte-order mark is not part of a text
    common = ("infer", "-m", saved, "--seed", 4, "--max-tokens", 6, "--json")
    from_file = json.loads(gptc(*common, "--prompt-file", file).out)
    assert from_file["prompt"] == text.removesuffix("\n")
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        from_pipe = json.loads(gptc(*common).out)
    assert from_pipe["prompt"] == from_file["prompt"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("not a pipe"))
    assert json.loads(gptc(*common).out)["prompt"] == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "-1"], 2, "temperature is -1.0; it must be 0 or more"),
        (["--top-p", "0"], 2, "top-p is 0.0"),
        (["--max-tokens", "0"], 2, "0 is less than 1"),
        (["-p", "x", "--prompt-file", "y"], 2, "-p and --prompt-file exclude each other"),
        (["--prompt-file", "nowhere.txt"], 1, "cannot read the prompt nowhere.txt"),
        (["-p", "x" * 60], 1, "the prompt has 60 tokens"),
        (["-m", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_infer_errors(
    gptc: Callable[..., Any], saved: Path, arguments: list[str], code: int, message: str
) -> None:
    ran = gptc("infer", *(["-m", saved] if "-m" not in arguments else []), *arguments)
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


# ---- output and options ----


def test_json_with_log_probabilities(infer: Callable[..., Any]) -> None:
    ran = infer("-p", "a", "--max-tokens", 4, "--json", "--logprobs", 2)
    (sample,) = json.loads(ran.out)["samples"]
    assert len(sample["logprobs"]) == sample["tokens"] == 4
    for entry in sample["logprobs"]:
        assert entry["logprob"] <= entry["top"][0]["logprob"] <= 0
        assert len(entry["top"]) == 2
        assert set(entry) == {"id", "token", "logprob", "top"}


def test_raw_bytes_are_nothing_but_bytes(
    saved: Path, writer: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    generation = Generation(
        writer, tokenizer, "\udcff\n", max_tokens=30, sampling=Sampling(2.0, seed=4), stop=()
    )
    assert list(generation)
    (tmp_path / "prompt").write_bytes(b"\xff\n\n")  # the final newline is not part of the prompt
    command = [
        sys.executable, "-m", "gptc", "infer", "-m", saved, "--prompt-file", tmp_path / "prompt",
        "--raw", "--max-tokens", "30", "--temperature", "2", "--seed", "4", "--dtype", "fp32",
    ]  # fmt: skip
    ran = subprocess.run([str(part) for part in command], capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"\xff\n" + bytes(generation.samples[0].tokens), b"")
    command[command.index("30")] = "300"
    ran = subprocess.run([str(part) for part in command], capture_output=True, check=True)
    assert b"note: the model's context of 48 tokens is full" in ran.stderr


def test_beams_are_listed_best_first(infer: Callable[..., Any]) -> None:
    common = ("-p", "On", "--max-tokens", 6, "--beams", 4)
    samples = json.loads(infer(*common, "--num-samples", 3, "--json").out)["samples"]
    scores = [sample["score"] for sample in samples]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert infer(*common).out == f"On{samples[0]['text']}\n"


def test_a_draft_writes_the_same(infer: Callable[..., Any], saved: Path) -> None:
    common = ("-p", "Once", "--max-tokens", 30)
    plain = infer(*common).out
    assert infer(*common, "--draft", saved).out == plain
    assert infer(*common, "--draft", "ngram").out == plain


def test_a_context_that_shifts(infer: Callable[..., Any]) -> None:
    common = ("-p", "Once", "--max-tokens", 100, "--json")
    assert json.loads(infer(*common).out)["samples"][0]["finish"] == "context"
    shifted = json.loads(infer(*common, "--context-shift").out)["samples"][0]
    assert (shifted["finish"], shifted["tokens"]) == ("length", 100)


def test_a_full_context_is_no_silent_end(infer: Callable[..., Any]) -> None:
    ran = infer("-p", "Once", "--max-tokens", 100)
    words = "note: the model's context of 48 tokens is full"
    shift = ": --context-shift continues from its newer half\n"
    assert (ran.code, ran.err) == (0, words + shift)
    assert infer("-p", "Once", "--max-tokens", 100, "--beams", 2).err == f"{words}\n"
    assert infer("-p", "Once", "--max-tokens", 100, "--context-shift").err == ""
    ran = infer("-p", "x" * 60)
    assert (ran.code, ran.out) == (1, "")
    assert "or continue from its newer half with --context-shift" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x", "-p", "y"], "-p is given twice: put several prompts into a file"),
        (["-p", "x", "--prompts", "y"], "-p and --prompts exclude each other"),
        (["--json", "--raw"], "--json and --raw exclude each other"),
        (["-p", "x", "--logprobs", "2"], "--logprobs needs JSON output"),
        (["-p", "x", "--raw", "--num-samples", "2"], "--raw writes one sample"),
        (["-p", "x", "--raw", "--stop", "y"], "takes no stop strings"),
        (["-p", "x", "--beams", "2", "--draft", "ngram"], "--beams and --draft exclude"),
        (["-p", "x", "--beams", "2", "--num-samples", "3"], "2 beams cannot give 3 samples"),
        (["-p", "x", "--beams", "2", "--context-shift"], "leave out --context-shift"),
        (["-p", "x", "--beams", "2", "--top-k", "3"], "leave out --top-k"),
        (["-p", "x", "--top-k", "9999999999"], "top-k is 9999999999"),
        (["-p", "x", "--logit-bias", "5"], "is not ID=NUMBER"),
        (["-p", "x", "--logit-bias", "5=inf"], "is not a finite number"),
        (["-p", "x", "--logit-bias", "999=1"], "token 999 is outside the vocabulary of 256"),
        (["-p", "x", "--typical-p", "0"], "typical-p is 0.0"),
        (["-p", "x", "--repetition-penalty", "0"], "repetition-penalty is 0.0"),
        (["-p", "x", "--presence-penalty", "nan"], "presence-penalty is nan"),
    ],
)
def test_contradictions_are_refused(
    infer: Callable[..., Any], arguments: list[str], message: str
) -> None:
    ran = infer(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
