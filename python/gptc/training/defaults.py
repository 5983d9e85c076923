"""Training defaults by preset, and those of fine-tuning."""

from __future__ import annotations

from typing import Any

from gptc.data.known import STORIES
from gptc.training.options import TrainOptions

DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        # Small batches: in a run of a minute, more updates help more than larger ones.
        "batch_size": 4,
        "seq_len": 160,
        "steps": 5000,
        "lr": 8e-3,
        "warmup_steps": 100,
        "beta2": 0.99,
        "eval_every": 1000,
        "eval_batches": 60,
    },
    "modern": {
        # Muon needs larger batches: its products cost the same for any.
        "batch_size": 8,
        "seq_len": 160,
        "steps": 5000,
        "lr": 8e-3,
        "warmup_steps": 100,
        "optimizer": "muon",
        "momentum": 0.9,
        "momentum_warmup": 50,
        "eval_every": 1000,
        "eval_batches": 30,
    },
    "byte": {
        "batch_size": 15,
        "seq_len": 1024,
        "steps": 20_000,
        "lr": 1e-4,
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "beta2": 0.999,
    },
    "gpt2": {
        "batch_size": 4,
        "seq_len": 1024,
        "grad_accum": 16,
        "steps": 20_000,
        "lr": 6e-4,
        "warmup_steps": 700,
    },
    "llama": {
        "batch_size": 8,
        "seq_len": 512,
        "grad_accum": 4,
        "steps": 20_000,
        "lr": 5e-4,
        "warmup_steps": 500,
    },
    "init-from": {
        "batch_size": 4,
        "seq_len": 512,
        "steps": 500,
        "lr": 1e-4,
        "warmup_steps": 20,
        "eval_every": 100,
    },
    "finetune": {
        "batch_size": 4,
        "seq_len": 512,
        "epochs": 3.0,
        "lora_rank": 16,
        "lr": 2e-4,
        "weight_decay": 0.0,
        "eval_every": 50,
        "eval_batches": 50,
    },
}
FULL_LR = 2e-5  # of `gptc finetune` without adapters
DPO_LR, FULL_DPO_LR = 1e-5, 1e-6  # with --dpo: of adapters, and without them
OTHER_DEFAULTS: dict[str, Any] = {"steps": 5000, "warmup_steps": 200}


def default_tokenizer(options: TrainOptions) -> str:
    """The tokenizer for data that is not prepared yet: bytes, which encode anything.

    On the built-in stories, a small model learns words sooner with subword tokens.
    """
    return "bpe:2048" if options.named_data in STORIES and options.preset != "byte" else "bytes"


def defaults_for(preset: str) -> dict[str, Any]:
    """The training defaults of a preset, else those of its family (the name up to a hyphen)."""
    family = preset.split("-")[0]
    return {**OTHER_DEFAULTS, **DEFAULTS.get(preset, DEFAULTS.get(family, {}))}


def default_alpha(rank: int) -> float:
    """The alpha of adapters that none is given for."""
    return 2.0 * rank
