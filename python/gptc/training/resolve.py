"""Resolves the options of a new or resumed run from those that were given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gptc.checkpoint.names import TRAINER
from gptc.checkpoint.reader import Checkpoint
from gptc.engine.config import presets
from gptc.errors import UPGRADE, GptcError, UsageError
from gptc.settings import check_types, declared, spelled
from gptc.training.defaults import default_alpha, defaults_for
from gptc.training.depth import PRESET, by_depth
from gptc.training.options import (
    FIXED,
    FIXED_CHATS,
    LIMITS,
    LORA,
    MUON,
    NEWER,
    SHAPE,
    TrainOptions,
)

SETS = (("tokens_per_step", "grad_accum"), ("warmup_share", "warmup_steps"))
"""Options, and those that they set."""


def new_options(given: Mapping[str, Any]) -> TrainOptions:
    """The options of a new run."""
    check_types(TrainOptions, given)
    if given.get("init_from") is not None:
        for name in ("preset", "depth", *SHAPE):
            if given.get(name) is not None:
                raise UsageError(
                    f"--{spelled(name)} cannot be given with --init-from: the checkpoint "
                    "determines the model's shape"
                )
        defaults = defaults_for("init-from")
    elif given.get("depth") is not None:
        defaults = _by_depth(given)
    else:
        preset = given.get("preset", TrainOptions.preset)
        if preset not in presets():
            close = difflib.get_close_matches(str(preset), presets(), n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(presets())}"
            raise UsageError(f"unknown preset {preset!r}{hint}")
        defaults = defaults_for(preset)
    if any(given.get(name) is not None for name in LIMITS):
        defaults |= dict.fromkeys(LIMITS)
    defaults["warmup_steps"] = None  # set when the number of steps is known
    _check_sets(given)
    options = TrainOptions(**{**defaults, **given})
    options.check()
    return options


def _by_depth(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of --depth."""
    known = declared(TrainOptions)
    for name, value in given.items():  # others follow from these
        known[name].check(value, f"--{spelled(name)}")
    preset = given.get("preset", PRESET)
    if preset != PRESET:
        raise UsageError(
            f"--depth {given['depth']} chooses the shape of {PRESET}: leave out --preset {preset}"
        )
    chosen = {**defaults_for(PRESET), **by_depth(given["depth"], given), "steps": None}
    if not isinstance(given.get("data", ""), str):
        del chosen["epochs"]  # of a mixture it has no meaning
    if given.get("warmup_steps") is not None:
        del chosen["warmup_share"]
    return chosen


def stored_options(base: Checkpoint) -> TrainOptions:
    """The options in a run's checkpoint. GptcError when `train` would not have written them."""
    trainer = base.trainer()
    assert trainer is not None
    stored, file = trainer["options"], base.path / TRAINER
    unknown = set(stored) - {field.name for field in fields(TrainOptions)}
    if unknown:
        raise GptcError(
            f"{base.path} has options unknown to this gptc ({', '.join(sorted(unknown))}): "
            f"{UPGRADE}"
        )
    missing = set(FIXED) - set(NEWER) - set(stored)  # older runs had none
    if missing:
        raise GptcError(f"{file} is damaged: its options lack {', '.join(sorted(missing))}")
    try:
        check_types(TrainOptions, stored)
        options = TrainOptions(**stored)
        options.check()
    except UsageError as error:
        raise GptcError(f"{file} is damaged: {error}") from None
    return options


def resumed_options(base: Checkpoint, given: Mapping[str, Any]) -> TrainOptions:
    """The options of a resumed run: the stored ones, overridden by those given."""
    check_types(TrainOptions, given)
    stored = asdict(stored_options(base))
    for name in (*FIXED, *FIXED_CHATS, *LORA, *MUON):
        before = getattr(base.config, name) if name in SHAPE else stored[name]
        if name == "lora_alpha" and before is None:
            before = default_alpha(stored["lora_rank"])
        if name in given and given[name] != before:
            raise UsageError(
                f"--{spelled(name)} cannot change on --resume (it was {before}); "
                f"to start a new run from these weights, use {base.begin}"
            )
    out = base.path.parent
    if given.get("out") is not None and Path(given["out"]).resolve() != out.resolve():
        raise UsageError(f"--out cannot be given with --resume: the run continues in {out}")
    if any(given.get(name) is not None for name in LIMITS):
        stored = {**stored, **dict.fromkeys(LIMITS)}
    _check_sets(given)
    options = TrainOptions(**{**stored, **given, "out": str(out)})
    options.check()
    return options


def _check_sets(given: Mapping[str, Any]) -> None:
    """UsageError for an option that sets another, given too."""
    for name, other in SETS:
        is_auto = other == "grad_accum" and given.get(other) == 0
        if given.get(name) is not None and given.get(other) is not None and not is_auto:
            raise UsageError(
                f"--{spelled(name)} {given[name]} sets --{spelled(other)}: leave out "
                f"--{spelled(other)} {given[other]}"
            )
