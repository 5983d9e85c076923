"""The options of ranks, adapters, reports and checkpoints, and of a model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from gptc.engine.lora import KINDS
from gptc.engine.options import WIRES
from gptc.settings import option

RANKS = "Several ranks"
ADAPTERS = "Adapters (LoRA)"
SAVE = "Reports and checkpoints"
MODEL_SHAPE = "Model shape (overrides the preset)"


@dataclass(frozen=True)
class RunOptions:
    """The options around a step, declared as in gptc.settings."""

    zero: int = option(
        0,
        "Sharding of the optimizer's state (ZeRO): 1 = a part on each rank, 0 = all of it on each.",
        section=RANKS,
        least=0,
        most=1,
    )
    wire: str = option(
        "fp32",
        "Form in which ranks send gradients; bf16 = half the bytes, int8 = about a quarter, both "
        "with error feedback.",
        section=RANKS,
        choices=WIRES,
    )
    sync_every: int = option(
        0,
        "Steps that ranks train apart until they take an outer step together (DiLoCo); 0 = they "
        "add their gradients in each step.",
        section=RANKS,
        least=0,
    )
    outer_lr: float = option(
        0.7, "Learning rate of the outer step, with --sync-every.", section=RANKS, above=0
    )
    outer_momentum: float = option(
        0.9,
        "Decay rate of the outer step's momentum (Nesterov's), with --sync-every.",
        section=RANKS,
        least=0,
        below=1,
    )
    comm_timeout: float = option(
        600.0,
        "Seconds without an answer after which a rank counts as lost; 0 = never.",
        section=RANKS,
        least=0,
    )

    lora_rank: int = option(
        0,
        "Rank of adapters of the model to fine-tune, which stays as it is; 0 = train all weights.",
        section=ADAPTERS,
        least=0,
        most=4096,
    )
    lora_alpha: float | None = option(
        None,
        "Adapters are scaled by this / rank.",
        section=ADAPTERS,
        above=0,
        shown="twice the rank",
    )
    lora_dropout: float = option(
        0.0, "Dropout probability of adapters' inputs.", section=ADAPTERS, least=0, below=1
    )
    lora_targets: str = option(
        "all",
        "Layers with adapters, separated by commas: qkv, q, k, v, proj, fc, gate, up, mlp_proj, "
        "all.",
        section=ADAPTERS,
        metavar="NAMES",
    )
    lora_kind: str = option(
        "plain", "Scale of adapters; rslora = alpha / sqrt(rank).", section=ADAPTERS, choices=KINDS
    )

    dora: bool = option(
        False, "Adapters with DoRA: learned lengths of the rows of matrices.", section=ADAPTERS
    )

    eval_every: int = option(
        250, "Steps between evaluations.", section=SAVE, least=1, shown="by preset"
    )
    eval_batches: int = option(
        20,
        "Batches per evaluation; 0 = the whole split.",
        section=SAVE,
        least=0,
        shown="by preset",
    )
    log_every: int | None = option(
        None,
        "Steps between lines of metrics.jsonl.",
        section=SAVE,
        least=1,
        shown="1, or more for a run of more than 20,000 steps",
    )
    sample_every: int = option(
        0, "Steps between samples; 0 = only at the end.", section=SAVE, least=0
    )
    save_every: int | None = option(
        None, "Steps between checkpoints.", section=SAVE, least=1, shown="as --eval-every"
    )
    tensorboard: bool = option(
        False,
        "TensorBoard event files in the run's folder. Needs tensorboardX or tensorboard.",
        section=SAVE,
    )
    wandb: bool = option(
        False, "Numbers and samples to Weights & Biases. Needs wandb.", section=SAVE
    )
    trackio: bool = option(False, "Numbers and samples to Trackio. Needs trackio.", section=SAVE)
    keep_last: int = option(
        2, "Number of newest checkpoints to keep, with the best; 0 = all.", section=SAVE, least=0
    )

    n_layer: int | None = option(None, "Number of layers.", section=MODEL_SHAPE, least=1)
    n_head: int | None = option(
        None, "Number of attention heads; divides --n-embd.", section=MODEL_SHAPE, least=1
    )
    n_kv_head: int | None = option(
        None, "Number of key and value heads; divides --n-head.", section=MODEL_SHAPE, least=1
    )
    n_embd: int | None = option(None, "Embedding width.", section=MODEL_SHAPE, least=1)
    n_ff: int | None = option(None, "Feed-forward width.", section=MODEL_SHAPE, least=1)
    n_expert: int | None = option(
        None,
        "Number of experts of each feed-forward layer, each that wide.",
        section=MODEL_SHAPE,
        least=1,
        shown="no experts",
    )
    n_expert_used: int | None = option(
        None,
        "Number of experts of a token.",
        section=MODEL_SHAPE,
        least=1,
        shown="2 with --n-expert",
    )
    router_loss: float | None = option(
        None,
        "Factor of the load-balance loss of experts in the gradient.",
        section=MODEL_SHAPE,
        least=0,
        shown="0.01 with --n-expert",
    )
    bias: bool | None = option(
        None, "Biases in linear layers and LayerNorms.", section=MODEL_SHAPE, shown="by preset"
    )
