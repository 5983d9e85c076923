"""`gptc infer --prompts`: reads prompts as JSON lines, writes samples as JSON lines."""

from __future__ import annotations

import codecs
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from gptc.errors import GptcError, UsageError
from gptc.files.limits import limit, refuse
from gptc.generation.options import Sampling, TextOptions
from gptc.settings import declared

if TYPE_CHECKING:
    from gptc.checkpoint.merged import AdapterSet
    from gptc.engine.model import Model
    from gptc.engine.world import World
    from gptc.generation.drafts import Draft
    from gptc.generation.request import Request, Sample
    from gptc.tokenizer.base import Tokenizer

_MOST_SKIPPED = 1 << 30  # bytes of a line that is too long: a device has no end
_ANSWER = ("samples", "error")  # keys of an answer; those of the line are dropped
_EXAMPLE = 'a line looks like {"prompt": "Once upon a time"}'


def as_text(value: dict[str, Any], indent: int | None = None) -> str:
    """JSON for standard output; escaped if its encoding lacks some of the characters."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def sample_json(sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample as a JSON object."""
    word = partial(tokenizer.decode, continued=True)
    entry: dict[str, Any] = {
        "text": sample.text,
        "tokens": sample.n_tokens,
        "finish": sample.finish,
    }
    if sample.request.options.logprobs is not None:
        entry["logprobs"] = [
            {
                "id": chosen.token,
                "token": word([chosen.token]),
                "logprob": round(chosen.logprob, 6),
                "top": [
                    {"id": i, "token": word([i]), "logprob": round(logprob, 6)}
                    for i, logprob in chosen.top
                ],
            }
            for chosen in sample.logprobs
        ]
    return entry


class _Answers:
    """Prints answers in the order of their prompts, each as soon as all before it are printed.

    Several ranks answer every N-th line each, and rank 0 prints all at the end.
    """

    def __init__(self, tokenizer: Tokenizer, out: TextIO, world: World) -> None:
        self._world = world
        self.n_prompts = self.n_failed = self.n_tokens = 0
        self._tokenizer = tokenizer
        self._out = out
        self._begun: dict[Request, tuple[int, dict[str, Any], dict[int, Any]]] = {}
        self._adapters: dict[Request, str | None] = {}
        self._ready: dict[int, dict[str, Any]] = {}
        self._next = 0

    def failed(self, line: dict[str, Any], error: GptcError) -> None:
        """Answers the line with an error."""
        if self.is_own():
            self.n_failed += 1
            self._give(self.n_prompts, {**line, "error": str(error)})
        self.n_prompts += 1

    def is_own(self) -> bool:
        """Whether this rank answers the next line."""
        return self.n_prompts % self._world.size == self._world.rank

    def passed(self) -> None:
        """Counts a line that another rank answers."""
        self.n_prompts += 1

    def begun(self, line: dict[str, Any], request: Request, adapter: str | None) -> None:
        """Registers the request of a line; the line is answered when all samples have ended."""
        self._begun[request] = (self.n_prompts, line, {})
        self._adapters[request] = adapter
        self.n_prompts += 1

    def adapter(self, sample: Sample) -> str | None:
        """The adapter that a sample is to be drawn with."""
        return self._adapters[sample.request]

    def ended(self, sample: Sample) -> None:
        """Takes a finished sample. Only what the answer says of it is kept."""
        self.n_tokens += sample.n_tokens
        request = sample.request
        number, line, entries = self._begun[request]
        entries[sample.index] = sample.error or sample_json(sample, self._tokenizer)
        if len(entries) < request.options.num_samples:
            return
        del self._begun[request], self._adapters[request]
        listed = [entries[i] for i in range(len(entries))]
        if error := next((entry for entry in listed if isinstance(entry, GptcError)), None):
            self.n_failed += 1
            self._give(number, {**line, "error": str(error)})
        else:
            self._give(number, {**line, "seed": request.sampling.seed, "samples": listed})

    def exchange(self) -> None:
        """Gives rank 0 the answers of the others, which it prints, and adds up the counts."""
        world, own = self._world, {str(n): answer for n, answer in self._ready.items()}
        every = world.gather_json([own, self.n_failed, self.n_tokens])
        self.n_failed = sum(n_failed for _, n_failed, _ in every)
        self.n_tokens = sum(n_tokens for *_, n_tokens in every)
        self._ready = {int(n): answer for part, *_ in every for n, answer in part.items()}
        if not world.rank:
            self._print()

    def _give(self, number: int, answer: dict[str, Any]) -> None:
        self._ready[number] = answer
        if self._world.size == 1:
            self._print()

    def _print(self) -> None:
        while self._next in self._ready:
            self._out.write(as_text(self._ready.pop(self._next)) + "\n")
            self._out.flush()
            self._next += 1


def answer(
    file: Path,
    gpt: Model,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    batch_size: int,
    draft: Draft | None,
    adapters: AdapterSet | None,
    world: World,
) -> None:
    """Continues every prompt of the file, batch_size samples at a time.

    With `adapters`, a line may name one; lines that follow one another with the same are decoded
    together.

    A line that fails is printed with its error, and the command exits with 1. The ranks of a
    `world` share the lines.
    """
    from gptc.files.words import plural
    from gptc.generation.decoder import Decoder

    answers = _Answers(tokenizer, sys.stdout, world)
    begin = time.perf_counter()
    samples = _samples(file, gpt, tokenizer, options, answers, adapters)
    for adapter, group in groupby(samples, answers.adapter):
        if adapters:
            adapters.use(gpt, adapter)
        for sample, _ in Decoder(gpt, tokenizer, batch_size, draft=draft).run(group):
            if sample.finish:
                answers.ended(sample)
    if world.size > 1:
        answers.exchange()
    if sys.stderr.isatty() and not world.rank:
        speed = answers.n_tokens / (time.perf_counter() - begin)
        click.echo(
            f"{plural(answers.n_prompts, 'prompt')}, {plural(answers.n_tokens, 'token')}, "
            f"{speed:,.0f} tokens/s",
            err=True,
        )
    if answers.n_failed:
        n_prompts = plural(answers.n_prompts, "prompt")
        raise world.refusal(
            f"{answers.n_failed} of {n_prompts} failed: see the errors in their lines"
        )


def _samples(
    file: Path,
    gpt: Model,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    answers: _Answers,
    adapters: AdapterSet | None,
) -> Iterator[Sample]:
    """The samples of every line, made lazily. No two lines share a seed."""
    from gptc.generation.request import make_request

    seed = options["sampling"].seed
    for line in _lines(file):
        shown = line if len(line) <= limit("line") else line[:1000]
        given: dict[str, Any] = {"line": shown.decode("utf-8", "replace")}
        try:
            given = _read(line)
            adapter = _adapter(given, adapters)
            settings = _settings(given, options, seed)
            request = make_request(gpt, tokenizer, given["prompt"], **settings)
        except GptcError as error:
            answers.failed(given, _by_key(error))
            continue
        seed = (seed + request.options.num_samples) % 2**63
        if not answers.is_own():
            answers.passed()
            continue
        answers.begun(given, request, adapter)
        yield from request.samples(tokenizer)


def _adapter(given: dict[str, Any], adapters: AdapterSet | None) -> str | None:
    """The adapter of a line: its own, else the first; null = none. UsageError for another."""
    names = adapters.names if adapters else ()
    if "adapter" not in given:
        return names[0] if names else None
    name = given["adapter"]
    if name is not None and name not in names:
        known = f"it must be one of {', '.join(names)}" if names else "no --adapter is given"
        raise UsageError(f"adapter is {name!r}; {known}")
    return None if name is None else str(name)


def _by_key(error: GptcError) -> GptcError:
    """The error with the setting spelled as in a line: max_tokens, not max-tokens."""
    return GptcError(
        re.sub(r"^(?:--)?([a-z-]+)(?= is )", lambda name: name[1].replace("-", "_"), str(error))
    )


def _lines(file: Path) -> Iterator[bytes]:
    """The lines that are not blank. They are UTF-8 regardless of the terminal's encoding."""
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as lines:
            for i, line in enumerate(_bounded(lines)):
                text = line.removeprefix(codecs.BOM_UTF8) if i == 0 else line
                if text.strip():
                    yield text.strip()
    except OSError as error:
        raise GptcError(f"cannot read the prompts {file}: {error.strerror}") from error


def _bounded(lines: BinaryIO) -> Iterator[bytes]:
    """Each line, or the beginning of one that exceeds the limit. GptcError for one without end."""
    while line := lines.readline(limit("line") + 1):
        rest, n_skipped = line, 0
        while rest and not rest.endswith(b"\n"):
            n_skipped += len(rest)
            if n_skipped > _MOST_SKIPPED:
                raise refuse("a line of the prompts", "line", "give JSON lines")
            rest = lines.readline(1 << 20)
        yield line


def _read(line: bytes) -> dict[str, Any]:
    """The line's object, without the keys of an answer."""
    if len(line) > limit("line"):
        raise refuse("the line", "line", "shorten its prompt")
    try:
        given = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError):
        raise UsageError(f"the line is not JSON; {_EXAMPLE}") from None
    if isinstance(given, str):
        given = {"prompt": given}
    if not isinstance(given, dict) or "prompt" not in given:
        raise UsageError(f'the line has no "prompt"; {_EXAMPLE}')
    if not isinstance(given["prompt"], str):
        raise UsageError(f"prompt is {given['prompt']!r}; it must be text: {_EXAMPLE}")
    return {name: value for name, value in given.items() if name not in _ANSWER}


def _settings(given: dict[str, Any], options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The options of make_request for a line: the line's own override the command's."""
    drawing = {n: d for n, d in declared(Sampling).items() if n != "bias"}
    writing = {n: d for n, d in declared(TextOptions).items() if n != "context_shift"}
    for name, declaration in (drawing | writing).items():
        if name in given:
            if given[name] is None:
                raise UsageError(f"{name} is null; leave it out")
            if name != "json_schema" or not isinstance(given[name], dict | bool):
                declaration.check_type(given[name], name)
    if not all(isinstance(word, str) for word in given.get("stop", [])):
        raise UsageError("stop must be a list of texts")
    try:
        own = {n: d.kind(given[n]) for n, d in drawing.items() if n in given}
    except OverflowError:
        raise UsageError("the line holds a number that is too large") from None
    chosen = {name: given[name] for name in writing if name in given}
    patterns = TextOptions.PATTERNS  # one in the line replaces any of the command line
    if given.keys() & set(patterns):
        chosen |= {name: given.get(name) for name in patterns}
    sampling = replace(options["sampling"], **{"seed": seed, **own})
    return {**options, **chosen, "sampling": sampling}
