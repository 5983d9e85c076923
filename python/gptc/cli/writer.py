"""The output of `gptc infer`: text as it is generated, raw bytes, or one JSON object."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gptc.cli.prompts import as_text, sample_json
from gptc.engine.model import Model
from gptc.generation.beam import beam_search
from gptc.generation.decoder import start
from gptc.generation.drafts import Draft
from gptc.generation.request import Request, Sample, make_request
from gptc.tokenizer.base import Tokenizer


class Writer:
    """Continues prompts, and reports speed and reasons to stop."""

    def __init__(
        self,
        gpt: Model,
        tokenizer: Tokenizer,
        path: Path,
        options: dict[str, Any],
        beams: int | None,
        random_seed: bool,
    ) -> None:
        """`path` is the model's, for reports; `options` are those of `make_request`.

        `random_seed`: the seed was drawn, so it is told, to repeat the text.
        """
        self.draft: Draft | None = None
        self._last: Sample | None = None
        self._gpt = gpt
        self._tokenizer = tokenizer
        self._path = path
        self._options = options
        self._beams = beams
        self._random_seed = random_seed

    def write(self, prompt: str | list[int], echo: str = "") -> None:
        """Prints the samples as they are generated, each after `echo`."""
        request = self._request(prompt)
        begin = time.perf_counter()
        try:
            if self._beams:
                samples = [sample for sample, _ in self._search(request)]
                pieces: Iterator[Any] = iter(())
            else:
                samples, pieces = self._start(request)
            self._last = samples[0]
            _stream(echo, samples, pieces)
        except KeyboardInterrupt:
            click.echo()  # ends the line that was being written
            raise
        self._tell(samples, time.perf_counter() - begin)

    def answer(self, prompt: str) -> None:
        """Prints samples of one of several prompts; an empty prompt continues the last text."""
        self.write(self._last.sequence if self._last and not prompt else prompt)
        # Each prompt gets a different seed.
        sampling = self._options["sampling"]
        step = self._options["num_samples"]
        self._options["sampling"] = replace(sampling, seed=(sampling.seed + step) % 2**63)

    def write_raw(self, prompt: str, echo: bool) -> None:
        """Writes the bytes of prompt, with `echo`, and continuation, unchanged."""
        out = sys.stdout.buffer
        if echo:
            out.write(prompt.encode("utf-8", "surrogateescape"))
        request = self._request(prompt)
        _, pieces = self._start(request)
        written = 0
        for sample, _ in pieces:
            new = sample.sequence[len(sample.request.prompt) + written :]
            out.write(self._tokenizer.decode_bytes(new))
            out.flush()
            written += len(new)
            if sample.finish == "context":
                click.echo(f"note: {self._why_full()}", err=True)
        self._tell_seed(request)

    def print_json(self, prompt: str) -> None:
        """Prints one JSON object with every sample."""
        request = self._request(prompt)
        begin = time.perf_counter()
        scores: list[float] = []
        if self._beams:
            found = self._search(request)
            samples, scores = [sample for sample, _ in found], [score for _, score in found]
        else:
            samples, pieces = self._start(request)
            for _ in pieces:
                pass
        n_tokens = sum(sample.n_tokens for sample in samples)
        listed = [sample_json(sample, self._tokenizer) for sample in samples]
        for entry, score in zip(listed, scores, strict=False):
            entry["score"] = round(score, 6)
        result = {
            "model": str(self._path),
            "prompt": prompt,
            "prompt_tokens": len(request.prompt),
            "seed": request.sampling.seed,
            "samples": listed,
            "tokens_per_s": round(n_tokens / (time.perf_counter() - begin), 1),
        }
        click.echo(as_text(result, indent=2))

    def _request(self, prompt: str | list[int]) -> Request:
        return make_request(self._gpt, self._tokenizer, prompt, **self._options)

    def _start(self, request: Request) -> tuple[list[Sample], Iterator[tuple[Sample, str]]]:
        return start(self._gpt, self._tokenizer, request, self.draft)

    def _search(self, request: Request) -> list[tuple[Sample, float]]:
        assert self._beams
        return beam_search(self._gpt, self._tokenizer, request, self._beams)

    def _why_full(self) -> str:
        hint = "" if self._beams else ": --context-shift continues from its newer half"
        return f"the model's context of {self._gpt.config.block_size:,} tokens is full{hint}"

    def _tell_seed(self, request: Request) -> None:
        if self._random_seed:
            click.echo(f"seed {request.sampling.seed}", err=True)

    def _tell(self, samples: list[Sample], seconds: float) -> None:
        ends = {sample.finish for sample in samples}
        if not sys.stderr.isatty():
            if "context" in ends:  # the one end that was not asked for
                click.echo(f"note: {self._why_full()}", err=True)
            self._tell_seed(samples[0].request)
            return
        n_tokens = sum(sample.n_tokens for sample in samples)
        reasons = {self._why_full()} if "context" in ends else set()
        if "length" in ends:
            reasons.add("--max-tokens is reached")
        if any(s.finish == "stop" and s.n_tokens == 0 for s in samples):
            reasons.add("the text has ended")
        why = f"; {', '.join(sorted(reasons))}" if reasons else ""
        guessed = ""
        if self.draft and self.draft.n_guessed:
            guessed = f", {self.draft.n_right} of {self.draft.n_guessed} guessed"
        click.echo(
            f"{self._path}: {n_tokens} tokens{guessed}, {n_tokens / seconds:,.0f} tokens/s, "
            f"seed {samples[0].request.sampling.seed}{why}",
            err=True,
        )


def _stream(prompt: str, samples: list[Sample], pieces: Iterator[Any]) -> None:
    """Prints the samples in order: the first unfinished one as it grows, the others later.

    Samples are decoded together, so their pieces arrive interleaved.
    """
    several = len(samples) > 1
    for i, sample in enumerate(samples):
        write_out((f"--- sample {i + 1} ---\n" if several else "") + prompt)
        printed = 0
        while True:
            for piece in sample.pieces[printed:]:
                write_out(piece)
                printed += 1
            if sample.finish is not None:
                break
            next(pieces)
        write_out("\n")


def write_out(text: str) -> None:
    """Writes and flushes text; surrogate escapes become their bytes."""
    out = sys.stdout
    try:
        out.write(text)
    except UnicodeEncodeError:
        out.flush()
        out.buffer.write(text.encode("utf-8", "surrogateescape"))
    out.flush()
