"""`gptc infer --prompts` answers every line, and a bad line does not stop the others."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptc import Model
from gptc.cli import prompts
from gptc.cli.prompts import sample_json
from gptc.generation import request
from gptc.generation.decoder import generate
from gptc.generation.sampling import TokenLogprob
from gptc.tokenizer.base import Tokenizer
from vocabularies import llama_like


def test_prompts_come_back_in_order_with_their_texts(
    infer: Callable[..., Any], writer: Model, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines: list[Any] = [
        {"prompt": "Once", "max_tokens": 12, "id": "a"},
        "just a text",
        {"prompt": "short", "max_tokens": 2, "num_samples": 3, "note": {"kept": [1, "é"]}},
        {"prompt": "own", "temperature": 0, "seed": 77, "max_tokens": 9},
        {"prompt": ""},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    ran = infer("--prompts", file, "--max-tokens", 5, "--batch-size", 2)
    assert (ran.code, ran.err) == (0, "")
    answers = [json.loads(line) for line in ran.out.splitlines()]
    seeds = [4, 5, 6, 77, 10]
    for line, answer, seed in zip(lines, answers, seeds, strict=True):
        given = {"prompt": line} if isinstance(line, str) else line
        samples = answer.pop("samples")
        assert answer == {**given, "seed": seed}
        expected = generate(
            writer, tokenizer, given["prompt"], max_tokens=given.get("max_tokens", 5), seed=seed,
            num_samples=given.get("num_samples", 1), temperature=given.get("temperature", 0.7),
        )  # fmt: skip
        assert [s["text"] for s in samples] == expected
        assert {s["finish"] for s in samples} == {"length"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line is not JSON"),
        ("[" * 100_000, "the line is not JSON"),
        ('{"text": "x"}', 'no "prompt"'),
        ('{"prompt": 5}', "prompt is 5; it must be text"),
        ("5", 'no "prompt"'),
        ('{"prompt": "x", "max_tokens": -1}', "max_tokens is -1; it must be 1 or more"),
        ('{"prompt": "x", "max_tokens": 1000.0}', "max_tokens is 1000.0; it must be a whole"),
        ('{"prompt": "x", "logprobs": -1}', "logprobs is -1; it must be 0 or more"),
        (
            '{"prompt": "x", "max_tokens": "many"}',
            "max_tokens is 'many'; it must be a whole number",
        ),
        ('{"prompt": "x", "top_p": 7}', "top_p is 7"),
        ('{"prompt": "x", "num_samples": 0}', "num_samples is 0"),
        ('{"prompt": "x", "num_samples": 10001}', "num_samples is 10001; it must be between 1 and"),
        ('{"prompt": "x", "stop": [1]}', "stop must be a list of texts"),
        ('{"prompt": "x", "top_k": 99999999999}', "top_k is 99999999999"),
        ('{"prompt": "x", "temperature": 1%s}' % ("0" * 400), "too large"),
        ('{"prompt": "x", "temperature": 1e39}', "temperature is 1e+39"),
        ('{"prompt": "x", "top_p": 1e-50}', "top_p is 1e-50"),
        ('{"prompt": "\\ud800"}', "U+D800"),
        (json.dumps({"prompt": "x" * 60}), "the prompt has 60 tokens"),
    ],
)
def test_a_bad_line_stops_no_other(
    infer: Callable[..., Any], tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    ran = infer("--prompts", file, "--max-tokens", 3)
    assert ran.code == 1
    assert "1 of 3 prompts failed" in ran.err
    first, bad, last = [json.loads(answer) for answer in ran.out.splitlines()]
    assert [len(answer["samples"]) for answer in (first, last)] == [1, 1]
    assert message in bad["error"]
    assert not bad["error"].startswith(("-", "_"))
    assert "samples" not in bad


def test_prompts_that_cannot_be_read(infer: Callable[..., Any], tmp_path: Path) -> None:
    ran = infer("--prompts", tmp_path / "nowhere")
    assert (ran.code, ran.out) == (1, "")
    assert "cannot read the prompts" in ran.err
    (tmp_path / "odd").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xff"}\n\n')
    ran = infer("--prompts", tmp_path / "odd", "--max-tokens", 2)
    first, second = [json.loads(line) for line in ran.out.splitlines()]
    assert len(first["samples"]) == 1
    assert "byte 12 of the line is not UTF-8" in second["error"]


def test_answers_can_be_asked_again(infer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "one").write_text('{"prompt": "a", "note": "\\udc80 é"}\n"b"\n')
    first = infer("--prompts", tmp_path / "one", "--max-tokens", 5)
    (tmp_path / "two").write_text(first.out)
    again = infer("--prompts", tmp_path / "two", "--max-tokens", 5, "--seed", 99)
    assert (again.code, again.out) == (0, first.out)


def test_a_line_may_ask_for_log_probabilities(infer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "a", "logprobs": 1}\n"a"\n')
    ran = infer("--prompts", tmp_path / "p", "--max-tokens", 3)
    asked, plain = (json.loads(line)["samples"][0] for line in ran.out.splitlines())
    assert [len(entry["top"]) for entry in asked["logprobs"]] == [1, 1, 1]
    assert "logprobs" not in plain


def test_a_line_that_is_too_long_is_refused_unread(
    infer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTC_LIMITS", "line=100")
    fits = json.dumps({"prompt": "a", "note": "x" * 70})
    assert len(fits) < 100
    long = json.dumps({"prompt": "y" * 5_000_000})
    (tmp_path / "p").write_text(f"{fits}\n{long}\n{fits}\n{'z' * 101}")
    ran = infer("--prompts", tmp_path / "p", "--max-tokens", 2)
    first, second, third, fourth = [json.loads(line) for line in ran.out.splitlines()]
    assert len(first["samples"]) == len(third["samples"]) == 1
    for answer in (second, fourth):
        assert "the line exceeds the limit of 100 bytes for a line" in answer["error"]
        assert "GPTC_LIMITS=line=SIZE" in answer["error"]
        assert len(json.dumps(answer)) < 2000
    assert ran.err.count("\n") == 1


def test_samples_are_made_as_they_are_decoded(
    infer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt is copied for each sample: 10,000 of them at once took gigabytes."""
    made: list[weakref.ref[Any]] = []
    most = 0
    init = request.Sample.__init__

    def counted(self: request.Sample, *args: Any) -> None:
        nonlocal most
        init(self, *args)
        made.append(weakref.ref(self))
        most = max(most, sum(ref() is not None for ref in made))

    monkeypatch.setattr(request.Sample, "__init__", counted)
    (tmp_path / "p").write_text('{"prompt": "abc", "num_samples": 40, "max_tokens": 2}\n"b"\n')
    ran = infer("--prompts", tmp_path / "p", "--batch-size", 3)
    samples, _ = (json.loads(line)["samples"] for line in ran.out.splitlines())
    assert len(samples) == 40
    assert len(made) == 41
    assert most <= 6


def test_tokens_are_shown_with_their_spaces() -> None:
    """A token of a continuation is not the first of a text, whose space would be taken away."""
    tokenizer = llama_like()
    token = int(tokenizer.encode("a", continued=False)[0])
    shown = TokenLogprob(token, -0.5, ((token, -0.5),))
    options = SimpleNamespace(logprobs=1)
    values = {"text": " a", "n_tokens": 1, "finish": "length", "logprobs": [shown]}
    sample: Any = SimpleNamespace(request=SimpleNamespace(options=options), **values)
    (found,) = sample_json(sample, tokenizer)["logprobs"]
    assert (found["token"], found["top"][0]["token"]) == (" ", " ")


@pytest.mark.timeout(60)
def test_a_line_without_an_end_ends_the_command(
    infer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_MOST_SKIPPED", 20 << 20)
    ran = infer("--prompts", "/dev/zero", "--max-tokens", 2)
    assert ran.code == 1
    assert "a line of the prompts exceeds the limit of" in ran.err
    assert ran.err.count("\n") == 1
