"""Options that other programs have, and what does the same here: for errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

# Of llama.cpp, nanoGPT, mlx-lm, peft and transformers; the first name that a command has is told.
_NAMES = {
    **dict.fromkeys(
        ("-n", "--n-predict", "--predict", "--max-new-tokens", "--max-length", "--num-tokens"),
        ("--max-tokens",),
    ),
    **dict.fromkeys(("-c", "--ctx-size", "--n-ctx", "--max-model-len"), ("--context",)),
    **dict.fromkeys(("-t", "-tb", "--threads-batch", "--n-threads"), ("--threads",)),
    **dict.fromkeys(("-s", "--random-seed"), ("--seed",)),
    **dict.fromkeys(("-f", "--file"), ("--prompt-file", "--data")),
    **dict.fromkeys(("-i", "-cnv", "--interactive", "--conversation", "--instruct"), ("--chat",)),
    **dict.fromkeys(("-sys", "--system-prompt"), ("--system",)),
    **dict.fromkeys(("-r", "--reverse-prompt", "--stop-sequence"), ("--stop",)),
    **dict.fromkeys(("-hf", "--hf-repo", "--hf-path", "--checkpoint"), ("--model", "--init-from")),
    **dict.fromkeys(("-md", "--model-draft", "--draft-model"), ("--draft",)),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), ("--kv-dtype",)),
    **dict.fromkeys(("-np", "--n-parallel"), ("--parallel",)),
    **dict.fromkeys(("-a", "--alias", "--served-model-name"), ("--name",)),
    **dict.fromkeys(("-j", "--num-proc", "--workers"), ("--jobs",)),
    **dict.fromkeys(("-o", "--output", "--output-dir", "--outfile", "--save-path"), ("--out",)),
    **dict.fromkeys(("--lora", "--adapter-path"), ("--adapter", "--out")),
    **dict.fromkeys(("-q", "--q-bits"), ("--quantize", "--dtype")),
    **dict.fromkeys(("--outtype", "--type"), ("--dtype",)),
    **dict.fromkeys(("--iters", "--max-iters", "--max-steps"), ("--steps",)),
    **dict.fromkeys(("--num-epochs", "--num-train-epochs"), ("--epochs",)),
    **dict.fromkeys(
        ("--train-batch-size", "--per-device-train-batch-size", "-b"), ("--batch-size",)
    ),
    **dict.fromkeys(("--block-size", "--max-seq-length", "--max-seq-len"), ("--seq-len",)),
    **dict.fromkeys(("--gradient-accumulation-steps",), ("--grad-accum",)),
    **dict.fromkeys(("--lr-scheduler-type",), ("--schedule",)),
    **dict.fromkeys(("--eval-interval", "--steps-per-eval", "--eval-steps"), ("--eval-every",)),
    **dict.fromkeys(("--eval-iters", "--val-batches"), ("--eval-batches",)),
    "--api-key": ("--api-key-file",),
    "--beta": ("--dpo-beta",),
    "--dataset": ("--data",),
    "--format": ("--to",),
    "--grammar-file": ("--grammar",),
    "--learning-rate": ("--lr",),
    "--rank": ("--lora-rank",),
    "--repeat-last-n": ("--penalty-last-n",),
    "--repeat-penalty": ("--repetition-penalty",),
    "--typical": ("--typical-p",),
}
_REMARKS = {
    **dict.fromkeys(
        ("--method", "--train-mode", "--rl", "--preference", "--loss-type"),
        "--dpo learns from chosen and rejected answers",
    ),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), "--device cuda uses a GPU"),
    **dict.fromkeys(
        ("-c", "--ctx-size", "--n-ctx", "--max-model-len"),
        "the context is the model's; --context-shift continues beyond it",
    ),
    "--resume": "a run is continued with gptc train --resume RUN",
}


def instead(name: str, known: Collection[str]) -> str | None:
    """What to type in place of an option that a command has not; None if that is not known.

    `known` are the options of the command.
    """
    dashed = name.replace("_", "-")  # nanoGPT's have underscores
    for there in _NAMES.get(dashed, ()):
        if there in known:
            return f"use {there}"
    if dashed in _REMARKS:
        return _REMARKS[dashed]
    longer = sorted(there for there in known if there.startswith(dashed) and len(dashed) > 3)
    return f"did you mean {' or '.join(longer)}?" if longer else None


def meant(name: str, known: Collection[str]) -> str | None:
    """The option that a name of Python or of a file was to be; None if that is not known.

    `known` are the names there, such as max_tokens.
    """
    dashed = "--" + name.replace("_", "-")
    flags = {"--" + field.replace("_", "-"): field for field in known}
    here = [flags[there] for there in _NAMES.get(dashed, ()) if there in flags]
    here += [flags[there] for there in sorted(flags) if there.startswith(dashed) and len(name) > 3]
    return next(iter(here or difflib.get_close_matches(name, known, n=1)), None)


def as_typed(option: str, args: Sequence[str]) -> str:
    """The whole word, such as -ngl, of which click names the first letter that it does not know."""
    if option.startswith("--"):
        return option
    pattern = rf"-[a-z]*{re.escape(option[1:])}[a-z]*"
    return next((arg for arg in args if re.fullmatch(pattern, arg)), option)
