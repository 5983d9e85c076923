"""Every option of a training run, declared once: see gptc.settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gptc.engine.options import DeviceOptions
from gptc.errors import UsageError
from gptc.settings import check, option

SCHEDULES = ("cosine", "linear", "wsd", "constant")
OPTIMIZERS = ("adamw",)
MOST_TOKENS = 2**28  # of a step: its batches are drawn before it begins

_WHAT = "What to train"
_LONG = "How long (the first limit reached ends the run)"
_STEP = "Batches and the optimizer (defaults by preset)"
_SAVE = "Reports and checkpoints"
_SHAPE = "Changes to the preset's shape"


@dataclass(frozen=True)
class TrainOptions(DeviceOptions):
    """What a run is told. The names are those of the command line, of TOML and of checkpoints."""

    SECTIONS: ClassVar[tuple[str, ...]] = (_WHAT, "Where", _LONG, _STEP, _SAVE, _SHAPE)

    data: str = option(
        "stories",
        "Folder from gptc prepare, text file, or dataset name (see gptc prepare --help).",
        section=_WHAT,
        metavar="DIR",
    )
    tokenizer: str | None = option(
        None,
        "Tokenizer for data that is not prepared yet, as in gptc prepare.",
        section=_WHAT,
        metavar="KIND",
        shown="bytes; bpe:2048 for stories unless the preset is byte",
    )
    preset: str = option(
        "tiny",
        "Shape and training defaults: tiny, byte, gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
        "llama-15m, llama-42m, llama-110m.",
        section=_WHAT,
        metavar="NAME",
    )
    out: str | None = option(
        None, "Folder of the run.", section=_WHAT, metavar="DIR", shown="runs/PRESET-DATA"
    )
    init_from: str | None = option(
        None,
        "Model to fine-tune: a checkpoint, run, folder or file.",
        section=_WHAT,
        metavar="PATH",
    )
    seed: int = option(
        1337, "Random seed of weights, batches, dropout and samples.", section=_WHAT, least=0
    )

    steps: int | None = option(
        None, "Optimizer steps in all.", section=_LONG, least=1, shown="by preset"
    )
    tokens: int | None = option(
        None, "Training tokens in all, such as 10M.", section=_LONG, least=1
    )
    epochs: float | None = option(None, "Passes over the training split.", section=_LONG, above=0)
    minutes: float | None = option(
        None, "Training time; the learning rate falls with it.", section=_LONG, above=0
    )

    batch_size: int = option(
        8, "Sequences in a micro-batch.", section=_STEP, least=1, shown="by preset"
    )
    seq_len: int = option(
        256,
        "Tokens in a sequence; also the context of a new model.",
        section=_STEP,
        least=1,
        shown="by preset",
    )
    grad_accum: int = option(
        1, "Micro-batches in a step.", section=_STEP, least=1, shown="by preset"
    )
    lr: float = option(6e-4, "Peak learning rate.", section=_STEP, above=0, shown="by preset")
    min_lr: float | None = option(
        None,
        "Learning rate of the last step.",
        section=_STEP,
        least=0,
        shown="a tenth of --lr",
    )
    warmup_steps: int | None = option(
        None, "Steps of linear warm-up.", section=_STEP, least=0, shown="by preset"
    )
    schedule: str = option(
        "cosine",
        "Learning rate after the warm-up; wsd falls in the last fifth.",
        section=_STEP,
        choices=SCHEDULES,
    )
    weight_decay: float = option(
        0.1, "Weight decay of matrices.", section=_STEP, least=0, shown="by preset"
    )
    beta1: float = option(0.9, "Decay of the mean of gradients.", section=_STEP, least=0, below=1)
    beta2: float = option(
        0.95,
        "Decay of the mean of squared gradients.",
        section=_STEP,
        least=0,
        below=1,
        shown="by preset",
    )
    eps: float = option(1e-8, "AdamW's epsilon.", section=_STEP, above=0)
    grad_clip: float = option(
        1.0, "Largest gradient norm; 0 = no clipping.", section=_STEP, least=0
    )
    dropout: float = option(0.0, "Dropout probability.", section=_STEP, least=0, below=1)
    optimizer: str = option("adamw", "Optimizer.", section=_STEP, choices=OPTIMIZERS)

    eval_every: int = option(
        250, "Steps between evaluations.", section=_SAVE, least=1, shown="by preset"
    )
    eval_batches: int = option(
        20,
        "Batches per evaluation; 0 = the whole split, as after the last step if that is cheap.",
        section=_SAVE,
        least=0,
        shown="by preset",
    )
    sample_every: int = option(
        0, "Steps between samples; 0 = only at the end.", section=_SAVE, least=0
    )
    save_every: int | None = option(
        None, "Steps between checkpoints.", section=_SAVE, least=1, shown="as --eval-every"
    )
    keep_last: int = option(2, "Number of checkpoints to keep; 0 = all.", section=_SAVE, least=0)

    n_layer: int | None = option(None, "Number of layers.", section=_SHAPE, least=1)
    n_head: int | None = option(
        None, "Number of attention heads; divides --n-embd.", section=_SHAPE, least=1
    )
    n_kv_head: int | None = option(
        None, "Number of key and value heads; divides --n-head.", section=_SHAPE, least=1
    )
    n_embd: int | None = option(None, "Width.", section=_SHAPE, least=1)
    n_ff: int | None = option(None, "Width of the feed-forward layer.", section=_SHAPE, least=1)
    bias: bool | None = option(
        None, "Biases in linear layers and LayerNorms.", section=_SHAPE, shown="by preset"
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all micro-batches of a step."""
        return self.batch_size * self.seq_len * self.grad_accum

    def check(self) -> None:
        """UsageError for a value outside its range, or values that contradict each other."""
        check(self, lambda flag: f"--{flag}")
        if self.tokens_per_step > MOST_TOKENS:
            raise UsageError(
                f"a step of --batch-size {self.batch_size} x --seq-len {self.seq_len} "
                f"x --grad-accum {self.grad_accum} is {self.tokens_per_step:,} tokens; "
                f"the most is {MOST_TOKENS:,}"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise UsageError(f"--min-lr is {self.min_lr}, above --lr, which is {self.lr}")


SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ff", "bias")
LIMITS = ("steps", "tokens", "epochs", "minutes")
# What a resumed run must share with its beginning: the model, and the stream of batches.
FIXED = ("preset", "init_from", "tokenizer", "seq_len", "seed", "optimizer", *SHAPE)
