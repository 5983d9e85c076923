"""Finding checkpoints: by path, in a run, or the newest of all runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gptc.checkpoint.adapter import AdapterCheckpoint, missing_base
from gptc.checkpoint.names import (
    ADAPTER,
    BEST,
    CHECKSUMS,
    CONFIG,
    ROOT,
    RUN_CONFIG,
    folders_in,
    list_checkpoints,
    logger,
)
from gptc.checkpoint.packed import PackedCheckpoint, is_packed
from gptc.checkpoint.reader import Checkpoint, read_checksums, size_problem
from gptc.errors import GptcError, UsageError
from gptc.files.paths import cache_folder
from gptc.files.whole import restore
from gptc.files.words import quoted
from gptc.formats import hub, peft
from gptc.formats.model_file import ModelFile
from gptc.formats.registry import is_foreign, is_model, open_model
from gptc.tokenizer.base import Tokenizer
from gptc.tokenizer.registry import is_spec


def open_checkpoint(path: str | Path | None = None, root: str | Path = ROOT) -> ModelFile:
    """The model at `path`: a checkpoint, a run's newest one, or a model in another format.

    A name that is not a path may be a model of the Hugging Face hub, which is then downloaded.
    """
    if path is not None:
        restore(Path(path))
        _check_link(Path(path))
    if path is not None and not Path(path).exists() and hub.is_name(str(path)):
        return open_folder(hub.fetch(str(path)))
    if path is not None and is_foreign(Path(path)):
        return open_model(Path(path))
    return open_folder(find_checkpoint(path, root))


def _check_link(path: Path) -> None:
    """GptcError for a link that leads to nothing, whose name is not that of a model elsewhere."""
    if path.is_symlink() and not path.exists():
        raise GptcError(
            f"{path} is a link to {path.readlink()}, which is not there: make the link again"
        )


def open_folder(folder: Path, base: ModelFile | None = None) -> Checkpoint:
    """The checkpoint in a folder; of adapters with `base`, or the base that they name."""
    if (folder / CONFIG).is_file() or not (folder / ADAPTER).is_file():
        return PackedCheckpoint(folder) if is_packed(folder) else Checkpoint(folder)
    if base is None:
        named = peft.base_of(folder)
        if not Path(named).exists():
            raise missing_base(folder, named)
        base = open_checkpoint(named)
    return AdapterCheckpoint(folder, base)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a run's newest checkpoint."""
    return open_checkpoint(path).tokenizer()


def find_checkpoint(path: str | Path | None = None, root: str | Path = ROOT) -> Path:
    """The folder itself if it is a checkpoint, else the newest whole checkpoint of that run.

    With no path, the newest of all runs under `root`.
    """
    if path is None:
        runs = [run for run in folders_in(Path(root)) if list_checkpoints(run)]
        if not runs:
            raise GptcError(f"there is no checkpoint under {root}/; make one with: gptc train")
        newest = max(runs, key=lambda run: list_checkpoints(run)[-1].stat().st_mtime_ns)
        return find_checkpoint(newest)

    folder = Path(path)
    restore(folder)
    _check_link(folder)
    if folder.is_file():
        raise GptcError(f"{folder} is a file; give the folder of a checkpoint or a run")
    if folder.name == BEST and list_checkpoints(folder.parent) and not folder.exists():
        raise GptcError(
            f"{folder.parent} has no best checkpoint, since its run has had no evaluations: "
            f"name {folder.parent}, for its newest"
        )
    if not folder.exists():
        raise GptcError(
            f"{folder} does not exist; train a model with: gptc train --out {quoted(folder)}"
        )
    if (folder / CONFIG).is_file():
        return folder
    if (folder / ADAPTER).is_file():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise GptcError(f"{folder} holds no checkpoint{_what_instead(folder)}")
    problems: list[str] = []
    for checkpoint in reversed(checkpoints):
        problem = _run_problem(checkpoint)
        if problem is None:
            for skipped in problems:
                logger.warning("warning: %s; using %s", skipped, checkpoint)
            return checkpoint
        problems.append(problem)
    raise GptcError(f"{folder} holds no whole checkpoint: {problems[0]}")


def _what_instead(folder: Path) -> str:
    """The end of an error about a folder without checkpoints: its kind, and the next command."""
    config = folder / RUN_CONFIG
    if config.is_file():
        return (
            " yet: its run ended before the first; begin it again with "
            f"gptc train --config {quoted(config)} --out {quoted(folder)}"
        )
    if (folder / "dataset.json").is_file():
        return f": it is a dataset; train on it with gptc train --data {quoted(folder)}"
    if (folder / "ngrams.json").is_file():
        return ": it holds n-grams, which gptc infer, eval, info and verify take"
    runs = [run for run in folders_in(folder) if list_checkpoints(run)]
    if runs:
        return f": it is a folder of runs; name one of them, such as {min(runs)}"
    return f": neither {CONFIG} nor folders ckpt-STEP"


def tokenizer_name(name: str) -> str:
    """The name for `make_tokenizer`: a run's folder becomes that of its newest checkpoint.

    That of a model's file becomes a folder in the cache with the file's tokenizer.
    """
    path = Path(name)
    if is_spec(name):
        return name
    if list_checkpoints(path):
        return str(find_checkpoint(path))
    if path.is_file() and is_model(path):
        return str(keep_tokenizer(open_model(path).tokenizer()))
    return name


def keep_tokenizer(tokenizer: Tokenizer) -> Path:
    """A folder in the cache with a model's tokenizer, for commands that take it by name."""
    text = json.dumps(tokenizer.to_json(), sort_keys=True)
    folder = cache_folder() / "model-tokenizers" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return folder


def _run_problem(checkpoint: Path) -> str | None:
    """The fault of a run's checkpoint, which always has checksums; None for a whole one.

    UsageError for limits (GPTC_LIMITS) that are none, which is not a fault of the checkpoint.
    """
    if not (checkpoint / CHECKSUMS).is_file():
        return f"{checkpoint / CHECKSUMS} is missing"
    try:
        return size_problem(checkpoint, read_checksums(checkpoint))
    except UsageError:
        raise
    except GptcError as error:
        return str(error)
