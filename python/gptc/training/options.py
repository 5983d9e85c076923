"""Every option of a training run, declared once: see gptc.settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptc.data.options import LONG_ROWS, PACKING, TEXT_PACKING, TRAIN_ON
from gptc.data.weights import Weighted, check_alone, weighted
from gptc.engine.options import DTYPES, DeviceOptions
from gptc.errors import UsageError
from gptc.settings import check, option, spelled
from gptc.training.run_options import ADAPTERS, MODEL_SHAPE, RANKS, SAVE, RunOptions
from gptc.training.step_options import STEP, StepOptions

MOST_TOKENS = 2**28  # of a step: all its batches are drawn before it begins

_WHAT = "Data, model and output"
_LONG = "Length (the first limit reached ends the run)"


@dataclass(frozen=True)
class TrainOptions(RunOptions, StepOptions, DeviceOptions):
    """The options of a run. Command line, TOML files and checkpoints use these names."""

    SECTIONS: ClassVar[tuple[str, ...]] = (
        _WHAT, "Device", _LONG, STEP, RANKS, ADAPTERS, SAVE, MODEL_SHAPE,
    )  # fmt: skip

    dtype: str = option(
        "auto",
        "Data type; bf16 = mixed precision, auto = bf16 if it is faster here. With --lora-rank "
        "also int8, int4, or packed: the matrices as a GGUF file has them, which is then auto.",
        section="Device",
        choices=("auto", *DTYPES),
    )

    data: str | tuple[str, ...] = option(
        "stories",
        "Dataset folder, text file, or dataset name (see gptc prepare --help); several as "
        "DIR:WEIGHT each, such as --data a:0.7 --data b:0.3.",
        section=_WHAT,
        metavar="DIR",
    )
    tokenizer: str | None = option(
        None,
        "Tokenizer for data not yet prepared, as in gptc prepare.",
        section=_WHAT,
        metavar="KIND",
        shown="bytes; for stories bpe:2048, unless the preset is byte",
    )
    preset: str = option(
        "tiny",
        "Model shape and training defaults: tiny, modern, byte, gpt2, gpt2-medium, gpt2-large, "
        "gpt2-xl, llama-15m, llama-42m, llama-110m.",
        section=_WHAT,
        metavar="NAME",
    )
    depth: int | None = option(
        None,
        "Size of a modern model: chooses its shape, batch, learning rate and tokens. Options that "
        "are given stay.",
        section=_WHAT,
        least=1,
        most=48,
    )
    out: str | None = option(
        None, "Folder for the run.", section=_WHAT, metavar="DIR", shown="runs/PRESET-DATA"
    )
    init_from: str | None = option(
        None,
        "Model to fine-tune: a checkpoint, run, folder or file.",
        section=_WHAT,
        metavar="PATH",
    )
    train_on: Literal["assistant", "completion", "all"] = option(
        "assistant",
        "Tokens of conversations to learn: all answers, the last one (completion), or all.",
        section=_WHAT,
        choices=TRAIN_ON,
    )
    long_rows: Literal["cut", "drop"] = option(
        "cut",
        "Treatment of conversations longer than --seq-len.",
        section=_WHAT,
        choices=LONG_ROWS,
    )
    packing: Literal["auto", "pad", "fit", "stream", "documents"] = option(
        "auto",
        "Rows of a batch. Of conversations: one (pad), or as many as fit, apart in attention. Of "
        "texts: the next tokens (stream), or these with documents apart in attention.",
        section=_WHAT,
        choices=("auto", *PACKING, *TEXT_PACKING),
        shown="pad; of texts stream, or as the model to fine-tune",
    )
    on_bad_row: str = option(
        "stop",
        "Treatment of rows that are not a conversation, as in gptc prepare.",
        section=_WHAT,
        choices=("stop", "skip"),
    )
    chat_template: str | None = option(
        None,
        "Chat template for rows of messages, as in gptc prepare.",
        section=_WHAT,
        metavar="FILE",
        shown="the model's, else ChatML",
    )
    dpo: bool = option(
        False,
        "Direct preference optimization: rows with chosen and rejected answers, in pairs.",
        section=_WHAT,
    )
    dpo_beta: float = option(
        0.1,
        "Strength of the pull to the model before training, with --dpo.",
        section=_WHAT,
        above=0,
    )
    seed: int = option(
        1337, "Random seed of weights, batches, dropout and samples.", section=_WHAT, least=0
    )

    steps: int | None = option(
        None, "Number of optimizer steps.", section=_LONG, least=1, shown="by preset"
    )
    tokens: int | None = option(
        None, "Number of training tokens, such as 10M.", section=_LONG, least=1
    )
    epochs: float | None = option(
        None, "Number of passes over the training split.", section=_LONG, above=0
    )
    minutes: float | None = option(
        None, "Training time; the learning-rate schedule follows it.", section=_LONG, above=0
    )

    patience: int = option(
        0,
        "Evaluations in a row without a better loss that end the run early; 0 = never.",
        section=_LONG,
        least=0,
    )

    def __post_init__(self) -> None:
        """Makes a tuple of a list, which files have."""
        if isinstance(self.data, list):
            object.__setattr__(self, "data", tuple(self.data))

    @property
    def mixture(self) -> list[Weighted]:
        """The datasets that are mixed; none with a single one."""
        return [] if isinstance(self.data, str) else weighted(self.data)

    @property
    def named_data(self) -> str:
        """The data in words."""
        return self.data if isinstance(self.data, str) else ", ".join(self.data)

    @property
    def trackers(self) -> list[str]:
        """The programs of others that the run writes for."""
        return [name for name in TRACKED if getattr(self, name)]

    @property
    def step_tokens(self) -> int:
        """Tokens of all micro-batches of a step."""
        return self.rows * self.seq_len * self.grad_accum

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.batch_size * (2 if self.dpo else 1)

    def check(self) -> None:
        """Raises UsageError for a value outside its range, or values that contradict each other."""
        check(self)
        if self.step_tokens > MOST_TOKENS:
            raise UsageError(
                f"a step of --batch-size {self.batch_size} x --seq-len {self.seq_len} "
                f"x --grad-accum {self.grad_accum} is {self.step_tokens:,} tokens; "
                f"it must be at most {MOST_TOKENS:,}"
            )
        self._check_data()
        if not self.grad_accum and self.tokens_per_step is None:
            raise UsageError("--grad-accum auto needs --tokens-per-step: add it, such as 64K")
        if self.lora_rank and self.init_from is None:
            raise UsageError(
                f"--lora-rank {self.lora_rank} needs --init-from: adapters change a trained model"
            )
        if self.dora and not self.lora_rank:
            raise UsageError("--dora is of adapters: add --lora-rank 16")
        if self.dpo:
            self._check_preference()
        if self.sync_every:
            self._check_sync()
        if self.lora_rank and self.optimizer != "adamw":
            raise UsageError(
                f"--optimizer {self.optimizer} trains all weights: with --lora-rank use adamw"
            )
        for name in ("muon_rows", "muon_cautious"):
            if getattr(self, name) and self.optimizer != "muon":
                raise UsageError(
                    f"--{spelled(name)} is of Muon: add --optimizer muon, or leave it out"
                )
        if self.dtype in DTYPES[2:] and not self.lora_rank:
            raise UsageError(
                f"--dtype {self.dtype} is not for training all weights: use fp32 or bf16, or train "
                "adapters with --lora-rank 16"
            )
        if self.seq_len_warmup and self.seq_len % 2:
            raise UsageError(
                f"--seq-len-warmup halves rows, and --seq-len {self.seq_len} is odd: use "
                f"--seq-len {self.seq_len + 1}"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise UsageError(f"--min-lr is {self.min_lr}; it must be at most --lr ({self.lr})")

    def _check_data(self) -> None:
        if isinstance(self.data, str):
            check_alone(self.data)
            return
        weighted(self.data)
        if self.epochs is not None:
            raise UsageError(
                f"--epochs {self.epochs:g} is of one dataset, and --data names "
                f"{len(self.data)}: use --steps or --tokens"
            )
        if self.dpo:
            raise UsageError("--dpo takes one --data, of pairs: leave the others out")

    def _check_sync(self) -> None:
        every = self.sync_every
        for name in ("eval_every", "save_every", "sample_every"):
            if rest := (value := getattr(self, name) or 0) % every:
                raise UsageError(
                    f"--{spelled(name)} is {value}, and ranks have one model at multiples of "
                    f"--sync-every {every}: use --{spelled(name)} {value - rest + every}"
                )
        refused = {
            "--zero 1 (the state of each rank is another)": self.zero,
            f"--wire {self.wire} (it is for gradients of each step)": self.wire != "fp32",
            "--ema (weights differ between outer steps)": self.ema,
            "--minutes (ranks would count other steps)": self.minutes,
            f"--on-nan {self.on_nan} (ranks would draw other batches)": self.on_nan != "stop",
        }
        if wrong := next((name for name, given in refused.items() if given), None):
            raise UsageError(f"--sync-every {every} excludes {wrong}: leave one out")

    def _check_preference(self) -> None:
        if self.init_from is None:
            raise UsageError("--dpo needs --init-from: it changes a trained model")
        for name, rate in ("dropout", self.dropout), ("lora-dropout", self.lora_dropout):
            if rate:
                raise UsageError(
                    f"--{name} {rate:g} with --dpo would make its losses random: leave it out"
                )
        for name, rate in ("label-smoothing", self.label_smoothing), ("z-loss", self.z_loss):
            if rate:
                raise UsageError(
                    f"--{name} {rate:g} changes the loss of tokens, and --dpo has one of pairs: "
                    "leave it out"
                )
        for name in ("batch_size_warmup", "seq_len_warmup"):
            if getattr(self, name):
                raise UsageError(
                    f"--{spelled(name)} {getattr(self, name)} excludes --dpo, whose steps have the "
                    "same number of pairs: leave it out"
                )
        for name, value in ("train-on", self.train_on), ("packing", self.packing):
            if value not in ("assistant", "completion", "auto", "pad"):
                raise UsageError(
                    f"--{name} {value} excludes --dpo, which compares the last answers of pairs"
                )


EXPERTS = ("n_expert", "n_expert_used", "router_loss")
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ff", *EXPERTS, "bias")
TRACKED = ("tensorboard", "wandb", "trackio")  # rows of gptc.training.trackers
LIMITS = ("steps", "tokens", "epochs", "minutes")
# Options that cannot change on --resume: the model, and the stream of batches.
FIXED = ("preset", "depth", "init_from", "tokenizer", "seq_len", "seed", "optimizer", *SHAPE)
NEWER = (*EXPERTS, "depth")  # runs of an older gptc have none
MUON = ("muon_rows",)
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_kind", "dora")
FIXED_CHATS = ("dpo", "dpo_beta", "train_on", "long_rows", "packing", "on_bad_row", "chat_template")
