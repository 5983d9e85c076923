"""The optimizers' settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdamW:
    """The settings of one AdamW update, with PyTorch's conventions.

    `lr` is the learning rate; `beta1` and `beta2` are the decay rates of the moments;
    `weight_decay` applies to matrices; `grad_clip` is the largest global norm of the gradients
    (0 = no clipping).
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping


@dataclass(frozen=True)
class Muon:
    """The settings of one Muon update, which changes the matrices of layers: `gpt_muon` in gpt.h.

    `momentum` is the decay rate of the momentum buffer. The step has numbers as large as AdamW's,
    so that `lr` and `weight_decay` can be the same. `grad_clip` is that of AdamW. `beta2` is the
    decay rate of the averages of rows, in a model with `muon_rows`. `cautious`: a number decays
    only where the step does not make it larger.
    """

    lr: float
    momentum: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    beta2: float = 0.95
    cautious: bool = False
