"""`gptc infer`: text from a model, as it comes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.params import COUNT, SIZE
from gptc.errors import GptcError, UsageError

if TYPE_CHECKING:
    from gptc.generation import Generation

_EPILOG = """\b
Examples:
  gptc infer -p "Once upon a time"                  the newest model under runs/
  gptc infer -m runs/tiny-stories --temperature 0 --max-tokens 100
  gptc infer -m gpt2 -p "Alan Turing theorized that"    downloads it, if there is no such folder
  gptc infer -m stories15M.bin --prompt-file question.txt --num-samples 3 --json
  echo "The king" | gptc infer -m runs/tiny-shakespeare
"""

_WHY = {
    "context": "the model's context is full",
    "length": "--max-tokens is reached",
}


@click.command("infer", epilog=_EPILOG)
@click.option("-m", "--model", metavar="PATH", help="Any model.  [the newest]")
@click.option("-p", "--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="- : stdin.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0: greedy.")
@click.option("--top-k", type=SIZE, default=0, metavar="N", help="Keep the N likeliest; 0: all.")
@click.option("--top-p", type=float, default=1.0, help="Keep this much probability; 1: all.")
@click.option("--min-p", type=float, default=0.0, help="Drop below this share of the likeliest.")
@click.option("--max-tokens", type=COUNT, default=256, show_default=True, metavar="N")
@click.option("--num-samples", type=COUNT, default=1, show_default=True, metavar="N")
@click.option("--seed", type=SIZE, metavar="N", help="The same text again.  [random]")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before it; may be repeated.  [<|endoftext|>]"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="Round the weights: faster.")
@click.option("--threads", type=SIZE, default=0, metavar="N", help="0: one for each core.")
@click.option("--json", "as_json", is_flag=True, help="Print the samples as one JSON object.")
def infer_command(
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    max_tokens: int,
    num_samples: int,
    seed: int | None,
    stop: tuple[str, ...],
    device: str,
    dtype: str,
    quantize: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Continue a text with a trained model.

    The prompt comes from -p, --prompt-file or standard input; without one, the model begins a
    document. The text goes to standard output, everything else to standard error.
    """
    text = _read_prompt(prompt, prompt_file)
    if seed is None:
        import secrets

        seed = secrets.randbits(31)
    from gptc.checkpoint import open_checkpoint
    from gptc.generation import Generation
    from gptc.sampling import DEFAULT_STOP, Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    sampling.check()
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    # Only a session computes here: no room for batches is needed.
    options = {"device": device, "dtype": quantize or dtype, "threads": threads, "max_batch": 0}
    with checkpoint.model(**options) as gpt:
        generation = Generation(
            gpt,
            tokenizer,
            text,
            max_tokens=max_tokens,
            sampling=sampling,
            num_samples=num_samples,
            stop=stop or DEFAULT_STOP,
        )
        begin = time.perf_counter()
        try:
            if as_json:
                for _ in generation:
                    pass
            else:
                _stream(text, generation)
        except KeyboardInterrupt:
            click.echo()  # ends the line that was being written
            raise
        seconds = time.perf_counter() - begin
    n_tokens = sum(len(sample.tokens) for sample in generation.samples)
    if as_json:
        result = {
            "model": str(checkpoint.path),
            "prompt": text,
            "prompt_tokens": generation.n_prompt,
            "seed": seed,
            "samples": [
                {"text": s.text, "tokens": len(s.tokens), "finish": s.finish}
                for s in generation.samples
            ],
            "tokens_per_s": round(n_tokens / seconds, 1),
        }
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    if sys.stderr.isatty():
        reasons = {_WHY[s.finish] for s in generation.samples if s.finish in _WHY}
        why = f"; {', '.join(sorted(reasons))}" if reasons else ""
        click.echo(
            f"{checkpoint.path}: {n_tokens} tokens, {n_tokens / seconds:,.0f} tokens/s, "
            f"seed {seed}{why}",
            err=True,
        )


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise UsageError("-p and --prompt-file exclude each other: give one of them")
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


def _stream(prompt: str, generation: Generation) -> None:
    """Prints the samples in order: the first one not finished as it comes, the others later.

    They are decoded together, so their pieces arrive interleaved.
    """
    samples = generation.samples
    several = len(samples) > 1
    printed = [0] * len(samples)
    current = 0
    _begin(prompt, 0, several)
    pieces: Any = iter(generation)
    while current < len(samples):
        sample = samples[current]
        new = sample.text[printed[current] :]
        if new:
            _write(new)
            printed[current] += len(new)
        if sample.finish is not None:
            _write("\n")
            current += 1
            if current < len(samples):
                _begin(prompt, current, several)
        else:
            next(pieces, None)


def _begin(prompt: str, index: int, several: bool) -> None:
    heading = f"--- sample {index + 1} ---\n" if several else ""
    _write(heading + prompt)


def _write(text: str) -> None:
    """Text at once, byte for byte also where it is no UTF-8."""
    out = sys.stdout
    try:
        out.write(text)
    except UnicodeEncodeError:
        out.flush()
        out.buffer.write(text.encode("utf-8", "surrogateescape"))
    out.flush()
