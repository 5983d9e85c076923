"""The public `Model`: the engine's, which can also be loaded from files and saved to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptc.checkpoint.adapter import save_adapter
from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.names import ROOT, folders_in, list_checkpoints
from gptc.checkpoint.writer import save
from gptc.engine import model as engine
from gptc.engine.options import Options
from gptc.errors import GptcError, UsageError
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer

Used = TypeVar("Used")


class Model(engine.Model):
    """A GPT on a device, made by `create` or `load`. It closes itself; twice is harmless."""

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Model:
        """The model of a checkpoint, of a run's newest checkpoint, or of a Hugging Face folder.

        `options` are those of `create`. Without any, the model is for inference: see `load_model`.
        """
        return on_newest(path, lambda file: load_model(file, **options))

    def save(
        self, path: str | Path, tokenizer: Tokenizer | None = None, *, replace: bool = False
    ) -> None:
        """Writes a checkpoint folder; it appears whole or not at all.

        It must not exist yet; with `replace`, a checkpoint may.
        """
        if self.options.lora:
            raise GptcError(
                f"cannot save {path}: the model has adapters; save them with save_adapter"
            )
        save(path, self, tokenizer=tokenizer, replace=replace)

    def save_adapter(
        self,
        path: str | Path,
        base: str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Writes the adapters as a folder of peft's; `base` is the model that they change."""
        save_adapter(path, self, open_checkpoint(base), tokenizer=tokenizer, replace=replace)


def on_newest(path: str | Path | None, use: Callable[[ModelFile], Used]) -> Used:
    """What `use` makes of the model at `path`, as `open_checkpoint` finds it.

    A run that is still training may remove a checkpoint while it is read. Then its newest is used.
    """
    seen = _checkpoints(path)
    while True:
        try:
            return use(open_checkpoint(path))
        except (GptcError, OSError):
            now = _checkpoints(path)
            if now == seen:
                raise
            seen = now


def _checkpoints(path: str | Path | None) -> set[Path]:
    """The checkpoints of the run at `path`, or without one of all runs."""
    runs = folders_in(ROOT) if path is None else [Path(path)]
    return {checkpoint for run in runs for checkpoint in list_checkpoints(run)}


_LONGEST_BATCH = 4096  # tokens of a sequence, unless more are asked for; sessions may be longer


def load_model(file: ModelFile, **options: Any) -> Model:
    """The model of a file, with its weights. `options` are those of `Model.create`.

    Without options the model is for inference: `training` is False, `max_batch` 1, `max_seq` at
    most 4,096, since memory for batches as long as some models' block sizes is seldom there. Unless
    another `dtype` is given, the quantized matrices of a file stay as they are stored: "packed".
    """
    _ = file.placement  # before anything is allocated for what a header claims
    settings = {"training": False, "max_batch": 1, **options}
    if not settings["training"]:
        settings.setdefault("max_seq", min(file.config.block_size, _LONGEST_BATCH))
    if file.lora is not None:
        settings.setdefault("lora", file.lora)
    settings |= _packing(file, settings)
    model = Model.create(file.config, **settings, init=False)
    try:
        file.load_into(model)
    except BaseException:
        model.close()
        raise
    return model


def _packing(file: ModelFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options with which a model keeps the blocks of its file; none where it does not."""
    dtype, blocks = settings.get("dtype", "auto"), file.packing()
    if dtype == "packed" and not blocks:
        raise UsageError(f"{file.path} has no quantized matrices: choose another dtype")
    trains_all = settings["training"] and not settings.get("lora")
    if not blocks or trains_all or dtype not in ("auto", "packed"):
        return {}
    names = ("device", "lora", "kv_dtype")
    device = Options(**{k: settings[k] for k in names if k in settings}).resolved().device
    return {"dtype": "packed", "device": device, "blocks": blocks}
