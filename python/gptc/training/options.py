"""What a training run is told: its options, their defaults by preset, and the learning rate.

The names are those of the command line, of a TOML file given with --config, and of what a
checkpoint stores.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from gptc.checkpoint.reader import Checkpoint
from gptc.data.known import STORIES
from gptc.engine.config import presets
from gptc.engine.options import DEVICES, DTYPES
from gptc.errors import UPGRADE, GptcError, UsageError
from gptc.files.sizes import parse_size

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True)
class TrainOptions:
    """Every training option; the names are those of the command line."""

    data: str = "stories"
    tokenizer: str | None = None  # for data not prepared yet; None: see default_tokenizer
    out: str | None = None  # None: a new folder under runs/
    preset: str = "tiny"
    init_from: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    pin: bool = False
    seed: int = 1337

    steps: int | None = None  # of these four limits the first one reached ends the run
    tokens: int | None = None
    epochs: float | None = None
    minutes: float | None = None

    batch_size: int = 8
    seq_len: int = 256
    grad_accum: int = 1
    lr: float = 6e-4
    min_lr: float | None = None  # None: a tenth of lr
    warmup_steps: int | None = None  # None: the preset's, but at most a tenth of the run
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    dropout: float = 0.0
    optimizer: str = "adamw"

    eval_every: int = 250
    eval_batches: int = 20  # 0: the whole validation split
    sample_every: int = 0  # 0: only at the end
    save_every: int | None = None  # None: with every evaluation
    keep_last: int = 2  # 0: all

    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    n_embd: int | None = None
    n_ff: int | None = None
    bias: bool | None = None

    def check(self) -> None:
        """Raises UsageError for a value outside its range."""
        choices = (
            ("device", self.device, ("auto", *DEVICES)),
            ("dtype", self.dtype, ("auto", *DTYPES[:2])),
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, ("adamw",)),
        )
        for name, value, known in choices:
            if value not in known:
                raise UsageError(f"--{name} is {value!r}, not one of {', '.join(known)}")
        positive = ("batch_size", "seq_len", "grad_accum", "lr", "eps", "eval_every")
        optional = ("steps", "tokens", "epochs", "minutes", "save_every")
        for name in (*positive, *optional):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise UsageError(f"--{spelled(name)} is {number}; it must be above 0")
        for name in (
            *("threads", "seed", "min_lr", "warmup_steps", "weight_decay", "grad_clip"),
            *("eval_batches", "sample_every", "keep_last"),
        ):
            number = getattr(self, name)
            if number is not None and not 0 <= number < math.inf:
                raise UsageError(f"--{spelled(name)} is {number}; it must be 0 or more")
        for name, number in asdict(self).items():
            if isinstance(number, int) and number >= 2**63:
                raise UsageError(f"--{spelled(name)} is {number}; it must be below 2**63")
        for name in ("beta1", "beta2", "dropout"):
            number = getattr(self, name)
            if not 0 <= number < 1:
                raise UsageError(f"--{name} is {number}; it must be at least 0 and below 1")
        n_tokens = self.batch_size * self.seq_len * self.grad_accum
        if n_tokens > MOST_TOKENS:
            raise UsageError(
                f"a step of --batch-size {self.batch_size} x --seq-len {self.seq_len} "
                f"x --grad-accum {self.grad_accum} is {n_tokens:,} tokens; "
                f"the most is {MOST_TOKENS:,}"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise UsageError(f"--min-lr is {self.min_lr}, above --lr, which is {self.lr}")


MOST_TOKENS = 2**28  # of a step: its batches are drawn before it begins
SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_ff", "bias")
LIMITS = ("steps", "tokens", "epochs", "minutes")
# What a resumed run must share with its beginning: the model, and the stream of batches.
FIXED = ("preset", "init_from", "tokenizer", "seq_len", "seed", "optimizer", *SHAPE)

# Training defaults by preset, and those of --init-from.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        # Small and often: within a minute the number of updates matters more than their size.
        "batch_size": 4,
        "seq_len": 160,
        "steps": 5000,
        "lr": 8e-3,
        "warmup_steps": 100,
        "beta2": 0.99,
        "eval_every": 1000,
        "eval_batches": 60,
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
}
OTHER_DEFAULTS: dict[str, Any] = {"steps": 5000, "warmup_steps": 200}


def default_tokenizer(options: TrainOptions) -> str:
    """The tokenizer for data that is not prepared yet: bytes, which take anything.

    The stories are text that we know, and a small model writes words sooner with pieces of words.
    """
    return "bpe:2048" if options.data in STORIES and options.preset != "byte" else "bytes"


def defaults_for(preset: str) -> dict[str, Any]:
    """The training defaults of a preset: its own, else those of the family it is named after."""
    family = preset.split("-")[0]
    return {**OTHER_DEFAULTS, **DEFAULTS.get(preset, DEFAULTS.get(family, {}))}


def new_options(given: Mapping[str, Any]) -> TrainOptions:
    """The options of a new run."""
    _check_types(given)
    if given.get("init_from") is not None:
        for name in ("preset", *SHAPE):
            if given.get(name) is not None:
                raise UsageError(
                    f"--{spelled(name)} cannot be given with --init-from: the checkpoint "
                    "decides the model's shape"
                )
        defaults = defaults_for("init-from")
    else:
        preset = given.get("preset", TrainOptions.preset)
        if preset not in presets():
            close = difflib.get_close_matches(str(preset), presets(), n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(presets())}"
            raise UsageError(f"no preset {preset!r}{hint}")
        defaults = defaults_for(preset)
    if any(given.get(name) is not None for name in LIMITS):
        defaults["steps"] = None
    defaults["warmup_steps"] = None  # chosen when the number of steps is known
    options = TrainOptions(**{**defaults, **given})
    options.check()
    return options


def resumed_options(base: Checkpoint, given: Mapping[str, Any]) -> TrainOptions:
    """The options of a run that continues: the stored ones, changed where that is possible."""
    _check_types(given)
    trainer = base.trainer()
    assert trainer is not None
    stored = dict(trainer["options"])
    unknown = set(stored) - {field.name for field in fields(TrainOptions)}
    if unknown:
        raise GptcError(
            f"{base.path} has options that this gptc does not know ({', '.join(sorted(unknown))}): "
            f"{UPGRADE}"
        )
    for name in FIXED:
        before = getattr(base.config, name) if name in SHAPE else stored[name]
        if name in given and given[name] != before:
            raise UsageError(
                f"--{spelled(name)} cannot change on --resume (it was {before}); "
                f"start a new run, if you like from its weights: --init-from {base.path}"
            )
    out = base.path.parent
    if given.get("out") is not None and Path(given["out"]).resolve() != out.resolve():
        raise UsageError(f"--out cannot be given with --resume: the run goes on in {out}")
    if any(given.get(name) is not None for name in LIMITS):
        stored = {**stored, **dict.fromkeys(LIMITS)}
    options = TrainOptions(**{**stored, **given, "out": str(out)})
    options.check()
    return options


def read_toml(path: Path) -> dict[str, Any]:
    """The options in a TOML file; its keys are the command line's names, with - or _."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid TOML: {error}") from None
    given = {key.replace("-", "_"): value for key, value in data.items()}
    try:
        given = {name: _sized(name, value) for name, value in given.items()}
        _check_types(given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return given


def _sized(name: str, value: Any) -> Any:
    """The number where a file writes it as the command line does, such as "64K"."""
    wanted = get_type_hints(TrainOptions).get(name)
    if isinstance(value, str) and int in getattr(wanted, "__args__", (wanted,)):
        try:
            return parse_size(value)
        except ValueError as error:
            raise UsageError(f"{spelled(name)}: {error}") from None
    return value


def to_toml(options: TrainOptions) -> str:
    """The options as `read_toml` reads them; unset ones are left out."""
    lines = []
    for name, value in asdict(options).items():
        if value is not None and name != "out":
            # TOML writes text, numbers and booleans as JSON does.
            lines.append(f"{spelled(name)} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def spelled(name: str) -> str:
    """An option's name as the command line writes it."""
    return name.replace("_", "-")


def _check_types(given: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown name or a value of the wrong type."""
    hints = get_type_hints(TrainOptions)
    for name, value in given.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {spelled(close[0])}?" if close else ""
            raise UsageError(f"no option {spelled(name)!r}{hint}")
        wanted = hints[name]
        accepted = getattr(wanted, "__args__", (wanted,))
        is_bool = isinstance(value, bool)
        if is_bool and bool in accepted:
            continue
        if not is_bool and isinstance(value, accepted):
            continue
        if not is_bool and isinstance(value, int) and float in accepted:
            continue
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        kind = next(kinds[t] for t in accepted if t in kinds)
        raise UsageError(f"{spelled(name)} is {value!r}; it must be {kind}")
