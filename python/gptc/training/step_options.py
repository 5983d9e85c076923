"""The options of a step: batches, schedule, loss and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from gptc.engine.options import MOMENTS, OPTIMIZERS, RECOMPUTE
from gptc.settings import option

SCHEDULES = ("cosine", "linear", "wsd", "constant")
STEP = "Batches and optimizer (defaults by preset)"


@dataclass(frozen=True)
class StepOptions:
    """The options of a step, declared as in gptc.settings."""

    batch_size: int = option(
        8,
        "Sequences per micro-batch; with --dpo pairs of them.",
        section=STEP,
        least=1,
        shown="by preset",
    )
    seq_len: int = option(
        256,
        "Tokens per sequence; also the context of a new model.",
        section=STEP,
        least=1,
        shown="by preset",
    )
    grad_accum: int = option(
        1,
        "Micro-batches per step; auto (0) = as many as --tokens-per-step needs.",
        section=STEP,
        least=0,
        shown="by preset",
        words={"auto": 0},
    )
    tokens_per_step: int | None = option(
        None,
        "Tokens per step, such as 64K, at least: sets --grad-accum.",
        section=STEP,
        least=1,
    )
    batch_size_warmup: int = option(
        0,
        "Steps in which the sequences of a step grow from an eighth to all.",
        section=STEP,
        least=0,
    )
    seq_len_warmup: int = option(
        0,
        "Steps in which texts are cut into rows of an eighth, a fourth and a half of --seq-len.",
        section=STEP,
        least=0,
    )
    lr: float = option(6e-4, "Peak learning rate.", section=STEP, above=0, shown="by preset")
    min_lr: float | None = option(
        None,
        "Learning rate of the last step.",
        section=STEP,
        least=0,
        shown="a tenth of --lr",
    )
    warmup_steps: int | None = option(
        None, "Number of linear warm-up steps.", section=STEP, least=0, shown="by preset"
    )
    warmup_share: float | None = option(
        None,
        "Share of the steps for the warm-up: sets --warmup-steps.",
        section=STEP,
        least=0,
        most=1,
    )
    schedule: str = option(
        "cosine",
        "Learning-rate schedule after the warm-up; wsd = constant, then falls at the end.",
        section=STEP,
        choices=SCHEDULES,
    )
    decay_share: float = option(
        0.2, "Share of the steps in which wsd falls.", section=STEP, above=0, most=1
    )
    weight_decay: float = option(
        0.1, "Weight decay, for matrices only.", section=STEP, least=0, shown="by preset"
    )
    beta1: float = option(0.9, "Decay rate of the first moment.", section=STEP, least=0, below=1)
    beta2: float = option(
        0.95,
        "Decay rate of the second moment.",
        section=STEP,
        least=0,
        below=1,
        shown="by preset",
    )
    eps: float = option(1e-8, "AdamW's epsilon.", section=STEP, above=0)
    grad_clip: float = option(1.0, "Largest gradient norm; 0 = no clipping.", section=STEP, least=0)
    on_nan: str = option(
        "stop",
        "Treatment of a step whose gradients are not finite: end the run, skip its batches, or go "
        "back to the last checkpoint and skip all batches since. The step itself changes no "
        "weight, and its batches are kept in the run's folder.",
        section=STEP,
        choices=("stop", "skip", "rollback"),
    )
    spike_sigmas: float = option(
        6.0,
        "Standard deviations above the mean of the last losses from which a loss is noted; 0 = "
        "never.",
        section=STEP,
        least=0,
    )
    debug_nans: bool = option(
        False,
        "Check the outputs of every op of a step, and name the first that is not finite. A step "
        "takes several times as long.",
        section=STEP,
    )
    dropout: float = option(0.0, "Dropout probability.", section=STEP, least=0, below=1)
    label_smoothing: float = option(
        0.0,
        "Share of each target that all tokens get alike. Losses shown stay those of the targets.",
        section=STEP,
        least=0,
        below=1,
    )
    z_loss: float = option(
        0.0,
        "Factor of the squared logarithm of the softmax's sum, such as 1e-4; not in losses shown.",
        section=STEP,
        least=0,
    )
    ema: float = option(
        0.0,
        "Decay rate of an average of the weights, such as 0.999, which is evaluated and saved in "
        "their place; 0 = none.",
        section=STEP,
        least=0,
        below=1,
    )
    optimizer: str = option(
        "adamw",
        "Optimizer; muon = Muon for the matrices of layers, AdamW for other parameters.",
        section=STEP,
        choices=OPTIMIZERS,
        shown="by preset",
    )
    optimizer_dtype: str = option(
        "fp32",
        "Data type of AdamW's moments, to save memory, on a CPU; int8 = with a scale for each 256. "
        "Muon's momentum stays fp32.",
        section=STEP,
        choices=MOMENTS,
    )
    momentum: float = option(
        0.95,
        "Decay rate of Muon's momentum.",
        section=STEP,
        least=0,
        below=1,
        shown="by preset",
    )
    muon_rows: bool = option(
        False,
        "Muon's steps with rows of like size (NorMuon): each is divided by an average of its size.",
        section=STEP,
    )
    muon_beta2: float = option(
        0.95, "Decay rate of the averages of --muon-rows.", section=STEP, least=0, below=1
    )
    muon_cautious: bool = option(
        False,
        "Weight decay only of numbers that Muon's step does not make larger.",
        section=STEP,
    )
    momentum_warmup: int = option(
        300,
        "Steps in which Muon's momentum rises to --momentum from 0.85, if that is more.",
        section=STEP,
        least=0,
        shown="by preset",
    )
    recompute: str = option(
        "none",
        "Activations to compute again in the backward pass, to save memory: of norms and the first "
        "feed-forward layers, or of whole layers.",
        section=STEP,
        choices=RECOMPUTE,
    )
    recompute_layers: int = option(
        0,
        "Number of layers, the first ones, in which --recompute computes more than norms again; "
        "0 = all.",
        section=STEP,
        least=0,
    )
