"""`gptc infer --prompts`: many prompts from JSON lines, their texts as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from gptc.errors import GptcError, UsageError

if TYPE_CHECKING:
    from gptc.generation import Draft, Request, Sample
    from gptc.model import Model
    from gptc.tokenizer import Tokenizer

# What a line may set for itself, and of which type; the fields of Sampling come to these.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "num_samples": (int,),
    "stop": (list,),
}


def sample_json(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample as JSON has it."""
    entry: dict[str, Any] = {
        "text": sample.text,
        "tokens": sample.n_tokens,
        "finish": sample.finish,
    }
    if sample.request.logprobs is not None:
        entry["logprobs"] = [
            {
                "id": chosen.token,
                "token": tokenizer.decode([chosen.token]),
                "logprob": round(chosen.logprob, 6),
                "top": [
                    {"id": i, "token": tokenizer.decode([i]), "logprob": round(logprob, 6)}
                    for i, logprob in chosen.top
                ],
            }
            for chosen in sample.logprobs
        ]
    return entry


class _Answers:
    """Prints the lines in order, as soon as those before them are complete."""

    def __init__(self, tokenizer: Tokenizer, out: TextIO) -> None:
        self.n_prompts = self.n_failed = self.n_tokens = 0
        self._tokenizer = tokenizer
        self._out = out
        self._lines: dict[int, dict[str, Any]] = {}  # without "samples" while they are written
        self._requests: dict[Request, tuple[int, list[Sample]]] = {}
        self._next = 0

    def failed(self, line: dict[str, Any], error: GptcError) -> None:
        self.n_failed += 1
        self._lines[self.n_prompts] = {**line, "error": str(error)}
        self.n_prompts += 1
        self._print()

    def begun(self, line: dict[str, Any], samples: list[Sample]) -> None:
        self._requests[samples[0].request] = (self.n_prompts, samples)
        self._lines[self.n_prompts] = line
        self.n_prompts += 1

    def ended(self, sample: Sample) -> None:
        self.n_tokens += sample.n_tokens
        number, samples = self._requests[sample.request]
        if all(s.finish for s in samples):
            del self._requests[sample.request]
            listed = [sample_json(s, self._tokenizer) for s in samples]
            self._lines[number] = {**self._lines[number], "samples": listed}
            self._print()

    def _print(self) -> None:
        while (line := self._lines.get(self._next)) and ("samples" in line or "error" in line):
            del self._lines[self._next]
            self._out.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._out.flush()
            self._next += 1


def answer(
    file: Path,
    gpt: Model,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    batch_size: int,
    draft: Draft | None,
) -> None:
    """Continues every prompt of the file, batch_size texts at a time.

    A line that cannot be answered is given back with its error, and the command ends with 1.
    """
    from gptc.generation import Decoder

    answers = _Answers(tokenizer, sys.stdout)
    begin = time.perf_counter()
    samples = _samples(file, gpt, tokenizer, options, answers)
    for sample, _ in Decoder(gpt, tokenizer, batch_size, draft=draft).run(samples):
        if sample.finish:
            answers.ended(sample)
    if sys.stderr.isatty():
        speed = answers.n_tokens / (time.perf_counter() - begin)
        click.echo(
            f"{answers.n_prompts} prompts, {answers.n_tokens} tokens, {speed:,.0f} tokens/s",
            err=True,
        )
    if answers.n_failed:
        raise GptcError(
            f"{answers.n_failed} of {answers.n_prompts} prompts failed; their lines say why"
        )


def _samples(
    file: Path, gpt: Model, tokenizer: Tokenizer, options: dict[str, Any], answers: _Answers
) -> Iterator[Sample]:
    """Every line's samples, as they are asked for. Each line draws with seeds of its own."""
    from gptc.generation import make_request

    seed = options["sampling"].seed
    for line in _lines(file):
        given: dict[str, Any] = {}
        try:
            given, settings = _read(line, options, seed)
            request = make_request(gpt, tokenizer, given["prompt"], **settings)
        except GptcError as error:
            answers.failed(given or {"line": line}, error)
            continue
        seed += request.num_samples
        samples = request.samples(tokenizer)
        answers.begun(given, samples)
        yield from samples


def _lines(file: Path) -> Iterator[str]:
    try:
        with sys.stdin if str(file) == "-" else file.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise GptcError(f"cannot read the prompts {file}: {reason}") from error


def _read(line: str, options: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The line's object, and the options for it."""
    from gptc.sampling import Sampling

    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError('no JSON; a line is such as {"prompt": "Once upon a time"}') from None
    if isinstance(given, str):
        given = {"prompt": given}
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise UsageError('no "prompt"; a line is such as {"prompt": "Once upon a time"}')
    kinds = {f.name: (float, int) if f.type == "float" else (int,) for f in fields(Sampling)}
    del kinds["bias"]
    for name, kind in (kinds | _OPTIONS).items():
        if name in given and (not isinstance(given[name], kind) or isinstance(given[name], bool)):
            raise UsageError(f"{name} is {given[name]!r}; it must be a {kind[0].__name__}")
    own = {name: given[name] for name in kinds if name in given}
    sampling = replace(options["sampling"], **{"seed": seed, **own})
    chosen = {name: given[name] for name in _OPTIONS if name in given}
    if not all(isinstance(word, str) for word in chosen.get("stop", [])):
        raise UsageError("stop must be a list of texts")
    return given, {**options, **chosen, "sampling": sampling}
