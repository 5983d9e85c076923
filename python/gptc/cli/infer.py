"""`gptc infer`: text from a model, as it comes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.checkpoint.facade import load_model
from gptc.cli.params import COUNT, SIZE, TokenBias
from gptc.errors import GptcError, UsageError

if TYPE_CHECKING:
    from gptc.engine.model import Model
    from gptc.formats.model_file import ModelFile
    from gptc.generation.decoder import Draft
    from gptc.generation.request import Request, Sample
    from gptc.tokenizer.base import Tokenizer

_EPILOG = """\b
Examples:
  gptc infer -p "Once upon a time"                  the newest model under runs/
  gptc infer                                        asks for prompts; an empty one goes on
  gptc infer -m runs/tiny-stories --temperature 0 --max-tokens 100
  gptc infer -m gpt2 -p "Alan Turing theorized that"    downloads it, if there is no such folder
  gptc infer -m stories15M.bin --prompt-file question.txt --num-samples 3 --json
  gptc infer --prompts questions.jsonl > answers.jsonl
  gptc infer -p "Her name is" --regex " [A-Z][a-z]+[.]"    writes what matches
  echo "The king" | gptc infer -m runs/tiny-shakespeare
"""


def _once(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The one prompt that was given. Of several, click would take the last without a word."""
    if len(given) > 1:
        raise UsageError("-p is given twice: put several prompts into a file, for --prompts")
    return given[0] if given else None


@click.command("infer", epilog=_EPILOG)
@click.option("-m", "--model", metavar="PATH", help="Any model.  [the newest]")
@click.option(
    "-p", "--prompt", metavar="TEXT", multiple=True, callback=_once, help="Text to continue."
)  # fmt: skip
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="- : stdin.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE",
    help='Many, one JSON a line: {"prompt": …}. Texts come as such lines.  - : stdin.',
)  # fmt: skip
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0: greedy.")
@click.option(
    "--top-k", type=SIZE, default=0, show_default=True, metavar="N",
    help="Keep the N likeliest; 0: all.",
)  # fmt: skip
@click.option(
    "--top-p", type=float, default=1.0, show_default=True,
    help="Keep this much probability; 1: all.",
)  # fmt: skip
@click.option(
    "--min-p", type=float, default=0.0, show_default=True,
    help="Drop below this share of the likeliest.",
)  # fmt: skip
@click.option(
    "--typical-p", type=float, default=1.0, show_default=True,
    help="Keep the most typical; 1: all.",
)  # fmt: skip
@click.option(
    "--repetition-penalty", type=float, default=1.0, show_default=True,
    help="Divides logits.  1: none.",
)  # fmt: skip
@click.option(
    "--presence-penalty", type=float, default=0.0, show_default=True,
    help="Off the logit of what was there.",
)  # fmt: skip
@click.option(
    "--frequency-penalty", type=float, default=0.0, show_default=True,
    help="The same, for each time.",
)  # fmt: skip
@click.option(
    "--penalty-last-n", type=SIZE, default=64, show_default=True, metavar="N",
    help="Tokens that penalties look back; 0: all.",
)  # fmt: skip
@click.option(
    "--logit-bias", "bias", type=TokenBias(), multiple=True, metavar="ID=X",
    help="Add X to a token's logit; -inf: never. May be repeated.",
)  # fmt: skip
@click.option("--beams", type=COUNT, metavar="N", help="The likeliest text, by N beams.")
@click.option(
    "--max-tokens", type=COUNT, default=256, show_default=True, metavar="N",
    help="Tokens to write at most.",
)  # fmt: skip
@click.option(
    "--num-samples", type=COUNT, default=1, show_default=True, metavar="N",
    help="Texts to write, each another one.",
)  # fmt: skip
@click.option("--seed", type=SIZE, metavar="N", help="The same text again.  [random]")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before it; may be repeated.  [<|endoftext|>]"
)
@click.option("--regex", metavar="PATTERN", help="Write what matches it, as a whole.")
@click.option(
    "--grammar", type=click.Path(path_type=Path), metavar="FILE",
    help="Write what its rule root describes: GBNF, as llama.cpp's.",
)  # fmt: skip
@click.option(
    "--context-shift", is_flag=True,
    help="Where the context is full, go on from its newer half.",
)  # fmt: skip
@click.option(
    "--draft", metavar="PATH",
    help="A small model that guesses ahead: the same text, sooner.  ngram: the text itself does.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
    help="auto: bf16 where that is faster.",
)  # fmt: skip
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="Round the weights: faster.")
@click.option(
    "--threads", type=SIZE, default=0, show_default=True, metavar="N", help="0: one for each core."
)
@click.option(
    "--batch-size", type=COUNT, default=16, show_default=True, metavar="N",
    help="Texts decoded at a time, with --prompts.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the samples as one JSON object.")
@click.option("--logprobs", type=SIZE, metavar="N", help="In JSON: each token's, and the N best.")
@click.option(
    "--raw", is_flag=True, help="Write the bytes and nothing else, for models of no text."
)
@click.pass_context
def infer_command(
    context: click.Context,
    /,
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    prompts: Path | None,
    seed: int | None,
    stop: tuple[str, ...],
    regex: str | None,
    grammar: Path | None,
    beams: int | None,
    draft: str | None,
    device: str,
    dtype: str,
    quantize: str | None,
    threads: int,
    batch_size: int,
    as_json: bool,
    raw: bool,
    max_tokens: int,
    num_samples: int,
    logprobs: int | None,
    context_shift: bool,
    **sampling: Any,
) -> None:
    """Continue a text with a trained model.

    The prompt comes from -p, --prompt-file or standard input. Without one, a terminal is asked for
    prompts, and elsewhere the model begins a document. The text goes to standard output, everything
    else to standard error.
    """
    _check_outputs(as_json, raw, prompts, num_samples, logprobs, beams, draft, stop)
    if beams:
        _refuse_beside_beams(context, sampling)
    rules = _read_rules(regex, grammar, beams)
    given = {"-p": prompt, "--prompt-file": prompt_file, "--prompts": prompts}
    _exclusive({name: value is not None for name, value in given.items()})
    asks = not (any(v is not None for v in given.values()) or as_json or raw) and _is_terminal()
    text = "" if prompts or asks else _read_prompt(prompt, prompt_file)
    if seed is None:
        import secrets

        seed = secrets.randbits(31)
    from gptc.checkpoint.find import open_checkpoint
    from gptc.generation.sampling import DEFAULT_STOP, Sampling

    settings = Sampling(seed=seed, **sampling)
    settings.check()
    options: dict[str, Any] = {
        "sampling": settings,
        "max_tokens": max_tokens,
        "num_samples": num_samples,
        "stop": stop or (() if raw else DEFAULT_STOP),
        "logprobs": logprobs,
        "context_shift": context_shift,
        **rules,
    }
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    # Only a session computes here: no room for batches is needed.
    loading = {"device": device, "threads": threads, "max_batch": 0}
    with ExitStack() as stack:
        with _made_ready(tokenizer):
            gpt = stack.enter_context(load_model(checkpoint, dtype=quantize or dtype, **loading))
        writer = _Writer(gpt, tokenizer, checkpoint, options, beams)
        if draft:
            n_seq = batch_size if prompts else num_samples
            writer.draft = _open_draft(
                stack, draft, gpt, tokenizer, n_seq, {"dtype": dtype, **loading}
            )
        if prompts:
            from gptc.cli.prompts import answer

            answer(prompts, gpt, tokenizer, options, batch_size, writer.draft)
        elif asks:
            from gptc.cli.interactive import converse

            converse(writer.answer)
        elif as_json:
            writer.print_json(text)
        elif raw:
            writer.write_raw(text)
        else:
            writer.write(text, echo=text)


@contextmanager
def _made_ready(tokenizer: Tokenizer) -> Iterator[None]:
    """The tokenizer reads its tables, when it is first used, while the weights are read."""

    def use() -> None:
        with suppress(GptcError):  # which will come again, where it can be told
            tokenizer.encode(" ")

    thread = threading.Thread(target=use)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _check_outputs(
    as_json: bool,
    raw: bool,
    prompts: Path | None,
    num_samples: int,
    logprobs: int | None,
    beams: int | None,
    draft: str | None,
    stop: tuple[str, ...],
) -> None:
    _exclusive({"--json": as_json, "--raw": raw, "--prompts": prompts is not None})
    if logprobs is not None and not (as_json or prompts):
        raise UsageError("--logprobs are part of JSON: add --json, or use --prompts")
    if raw and num_samples > 1:
        raise UsageError("--raw writes one sample and nothing else; leave out --num-samples")
    if raw and stop:
        raise UsageError("--raw is for models of no text, and has no stop strings")
    for name, given in (("--draft", draft), ("--prompts", prompts), ("--raw", raw)):
        if beams and given:
            raise UsageError(f"--beams and {name} exclude each other")


def _read_rules(regex: str | None, grammar: Path | None, beams: int | None) -> dict[str, str]:
    """What the text must match, as make_request has it; known to be sound."""
    _exclusive({"--regex": regex is not None, "--grammar": grammar is not None})
    if regex is None and grammar is None:
        return {}
    name = "--grammar" if regex is None else "--regex"
    _exclusive({"--beams": beams is not None, name: True})
    from gptc.generation.grammar.parser import parse_grammar, parse_regex

    if regex is not None:
        parse_regex(regex)
        return {"regex": regex}
    assert grammar
    try:
        text = grammar.read_text("utf-8-sig")
    except OSError as error:
        raise GptcError(f"cannot read the grammar {grammar}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise GptcError(
            f"byte {error.start} of the grammar {grammar} is no UTF-8: convert it to UTF-8"
        ) from None
    parse_grammar(text)
    return {"grammar": text}


def _refuse_beside_beams(context: click.Context, sampling: dict[str, Any]) -> None:
    """What a search for the likeliest text has no use for, if it was typed."""
    for name in sampling:
        if (
            name != "bias"
            and context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        ):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"--beams looks for the likeliest text: leave out {option}")


def _exclusive(given: dict[str, bool]) -> None:
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other: give one of them")


def _open_draft(
    stack: ExitStack,
    name: str,
    gpt: Model,
    tokenizer: Tokenizer,
    n_seq: int,
    loading: dict[str, Any],
) -> Draft:
    from gptc.generation.drafts import ModelDraft, NgramDraft, check_draft

    if name == "ngram":
        return NgramDraft()
    from gptc.checkpoint.find import open_checkpoint

    checkpoint = open_checkpoint(name)
    small = stack.enter_context(load_model(checkpoint, **loading))
    check_draft(gpt, tokenizer, small, checkpoint.tokenizer())
    return ModelDraft(small, tokenizer, n_seq)


class _Writer:
    """Continues prompts, and says how that went."""

    def __init__(
        self,
        gpt: Model,
        tokenizer: Tokenizer,
        checkpoint: ModelFile,
        options: dict[str, Any],
        beams: int | None,
    ) -> None:
        self.draft: Draft | None = None
        self._last: Sample | None = None
        self._gpt = gpt
        self._tokenizer = tokenizer
        self._path = checkpoint.path
        self._options = options
        self._beams = beams

    def write(self, prompt: str | list[int], echo: str = "") -> None:
        """Prints the texts as they come, after `echo`."""
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
        """The same for one of several prompts; an empty one goes on with the last text."""
        self.write(self._last.sequence if self._last and not prompt else prompt)
        # Chance is another one for each.
        sampling = self._options["sampling"]
        step = self._options["num_samples"]
        self._options["sampling"] = replace(sampling, seed=(sampling.seed + step) % 2**63)

    def write_raw(self, prompt: str) -> None:
        """The bytes of prompt and continuation, unchanged."""
        out = sys.stdout.buffer
        out.write(prompt.encode("utf-8", "surrogateescape"))
        _, pieces = self._start(self._request(prompt))
        written = 0
        for sample, _ in pieces:
            new = sample.sequence[len(sample.request.prompt) + written :]
            out.write(self._tokenizer.decode_bytes(new))
            out.flush()
            written += len(new)
            if sample.finish == "context":
                click.echo(f"note: {self._why_full()}", err=True)

    def print_json(self, prompt: str) -> None:
        """One object with every sample."""
        from gptc.cli.prompts import as_text, sample_json

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
        from gptc.generation.request import make_request

        return make_request(self._gpt, self._tokenizer, prompt, **self._options)

    def _start(self, request: Request) -> tuple[list[Sample], Iterator[tuple[Sample, str]]]:
        from gptc.generation.decoder import start

        return start(self._gpt, self._tokenizer, request, self.draft)

    def _search(self, request: Request) -> list[tuple[Sample, float]]:
        from gptc.generation.beam import beam_search

        assert self._beams
        return beam_search(self._gpt, self._tokenizer, request, self._beams)

    def _why_full(self) -> str:
        goes_on = "" if self._beams else ": --context-shift goes on from its newer half"
        return f"the model's context of {self._gpt.config.block_size:,} tokens is full{goes_on}"

    def _tell(self, samples: list[Sample], seconds: float) -> None:
        ends = {sample.finish for sample in samples}
        if not sys.stderr.isatty():
            if "context" in ends:  # not an end that was asked for
                click.echo(f"note: {self._why_full()}", err=True)
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


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None:
        return prompt
    stdin = file is not None and str(file) == "-"
    if file is None and not _is_piped():
        return ""
    try:
        data = sys.stdin.buffer.read() if file is None or stdin else file.read_bytes()
    except OSError as error:
        raise GptcError(f"cannot read the prompt {file}: {error.strerror}") from error
    # One line's end belongs to the tool that wrote the file, not to the prompt. Bytes that are no
    # UTF-8 are kept for the tokenizer that can express them.
    return data.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file: what a program gives, or a closed one, is not."""
    import os
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _is_terminal() -> bool:
    """Whether somebody sits there who can be asked."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout.isatty())


def _stream(prompt: str, samples: list[Sample], pieces: Iterator[Any]) -> None:
    """Prints the samples in order: the first one not finished as it comes, the others later.

    They are decoded together, so their pieces arrive interleaved.
    """
    several = len(samples) > 1
    for i, sample in enumerate(samples):
        _write((f"--- sample {i + 1} ---\n" if several else "") + prompt)
        printed = 0
        while True:
            for piece in sample.pieces[printed:]:
                _write(piece)
                printed += 1
            if sample.finish is not None:
                break
            next(pieces)
        _write("\n")


def _write(text: str) -> None:
    """Text at once, byte for byte also where it is no UTF-8."""
    out = sys.stdout
    try:
        out.write(text)
    except UnicodeEncodeError:
        out.flush()
        out.buffer.write(text.encode("utf-8", "surrogateescape"))
    out.flush()
