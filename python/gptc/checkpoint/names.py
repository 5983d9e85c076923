"""The names of a checkpoint's files and of a run's checkpoints."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # of peft, in place of a config
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"  # of adapters: the model that they were trained with
WEIGHTS = "model.safetensors"
PACKED = "model.gguf"  # in its place: matrices of blocks
RUN_CONFIG = "config.toml"  # of a run, next to its checkpoints
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
CHECKSUMS = "checksums.json"
BEST = "best"  # a link in a run's folder to its checkpoint with the lowest validation loss
ROOT = Path("runs")  # the default folder of runs


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [f for f in folders_in(run) if re.fullmatch(r"ckpt-\d+", f.name)]
    return sorted(found, key=step_of)


def checkpoint_name(step: int) -> str:
    """The folder name of a run's checkpoint after `step` steps."""
    return f"ckpt-{step:06d}"


def model_name(path: Path) -> str:
    """The name of a model for people: that of its run, or else of its folder or file.

    A link is not followed, so that a link to a model is a name for it.
    """
    return path.stem if path.is_file() else adapter_name(path)


def adapter_name(path: Path) -> str:
    """The name of an adapter: that of its run, folder or file, as the path says it.

    A link is not followed, so that the name stays the same when its target is another one. The
    hub's cache names folders by a commit, below `models--OWNER--NAME/snapshots`.
    """
    path = Path(os.path.normpath(path.absolute()))
    *_, cached, kept = ("", "", *path.parent.parts[-2:])
    if kept == "snapshots" and cached.startswith("models--"):
        return cached.split("--")[-1]
    return path.parent.name if path.name == BEST or path.name.startswith("ckpt-") else path.name


def step_of(checkpoint: Path) -> int:
    """The step in a name that `checkpoint_name` made."""
    return int(checkpoint.name.removeprefix("ckpt-"))


def folders_in(parent: Path) -> list[Path]:
    return [f for f in parent.iterdir() if f.is_dir()] if parent.is_dir() else []


TRAINER_VERSION = 1  # of trainer.json
CHECKSUMS_VERSION = 2  # 1 recorded a SHA-256
# Prefixes in OPTIMIZER of the state of AdamW and of Muon, by their names in a model.
MOMENTS = {"moment1": "m", "moment2": "v", "momentum": "momentum", "row_moment": "rows"}
OUTER = "outer"  # prefix in OPTIMIZER of the momentum of DiLoCo's outer steps
RESIDUAL = "residual"  # the same of what --wire rounds off, behind the prefix of a rank above 0
OWN = "own"  # prefix in OPTIMIZER of the weights whose average a checkpoint has
logger = logging.getLogger("gptc")
