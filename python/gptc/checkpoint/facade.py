"""The public `Model`: the engine's, which can also be loaded from files and saved to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptc.checkpoint.find import open_checkpoint
from gptc.checkpoint.writer import save
from gptc.engine import model as engine
from gptc.formats.model_file import ModelFile
from gptc.tokenizer.base import Tokenizer


class Model(engine.Model):
    """A GPT on a device, made by `create` or `load`. It closes itself; twice is harmless."""

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Model:
        """The model of a checkpoint, of a run's newest checkpoint, or of a Hugging Face folder.

        `options` are those of `create`. Without any, the model is for inference: see `load_model`.
        """
        return load_model(open_checkpoint(path), **options)

    def save(
        self, path: str | Path, tokenizer: Tokenizer | None = None, *, replace: bool = False
    ) -> None:
        """Writes a checkpoint folder; it appears whole or not at all.

        It must not exist yet; with `replace`, a checkpoint may.
        """
        save(path, self, tokenizer=tokenizer, replace=replace)


_LONGEST_BATCH = 4096  # tokens of a sequence, unless more are asked for; sessions may be longer


def load_model(file: ModelFile, **options: Any) -> Model:
    """The model of a file, with its weights. `options` are those of `Model.create`.

    Without options the model is for inference: `training` is False, `max_batch` 1, `max_seq` at
    most 4,096, since memory for batches as long as some models' block sizes is seldom there.
    """
    _ = file.placement  # before anything is allocated for what a header claims
    settings = {"training": False, "max_batch": 1, **options}
    if not settings["training"]:
        settings.setdefault("max_seq", min(file.config.block_size, _LONGEST_BATCH))
    model = Model.create(file.config, **settings, init=False)
    try:
        file.load_into(model)
    except BaseException:
        model.close()
        raise
    return model
