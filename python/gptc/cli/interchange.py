"""`gptc import`, `gptc export` and `gptc verify`: models in the formats of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptc.cli.command import Command
from gptc.cli.complete import complete
from gptc.cli.params import COUNT, SizeParam, model_option
from gptc.convert.export_model import DTYPES, ExportReport, export_model
from gptc.files.words import quoted
from gptc.formats.registry import FORMATS

if TYPE_CHECKING:
    from gptc.formats.model_file import ModelFile


def _dtypes_help() -> str:
    """The dtypes that several formats share, then those of one format, with its name."""
    groups: dict[str, dict[str, None]] = {}
    for dtype in (dtype for dtypes in DTYPES.values() for dtype in dtypes):
        holders = [to for to, dtypes in DTYPES.items() if dtype in dtypes]
        groups.setdefault(f" ({holders[0]})" if len(holders) == 1 else "", {})[dtype] = None
    return "; ".join(", ".join(names) + holder for holder, names in groups.items())


_READ = ", ".join(known.title for known in FORMATS)
_WRITTEN = " or ".join(", ".join(DTYPES).rsplit(", ", 1))
_IMPORT_HELP = f"""Convert the model at PATH to a checkpoint.

The format is detected. Known are a Hugging Face folder or hub name, {_READ}.
"""

_IMPORT_EPILOG = """\b
Examples:
  gptc import stories15M.bin --out stories
  gptc import gpt2_124M.bin --out gpt2 && gptc infer -m gpt2 -p "Alan Turing"
  gptc import model.gguf --out model
  gptc import _gpt.bin --out bytes --n-head 8 --seq-len 1024
"""
_EXPORT_EPILOG = """\b
Examples:
  gptc export -m runs/tiny-stories --to gguf --dtype q8_0 --out stories.gguf
  gptc export -m runs/tiny-stories --to llama2.c --out stories.bin
  gptc export -m gpt2 --to llm.c --dtype bf16 --out gpt2_124M_bf16.bin
  gptc export -m runs/tiny-stories --to hf --out stories-hf
  gptc export -m runs/adapter --merge --to gguf --out tuned.gguf
  gptc export -m runs/adapter --to gguf --out adapter.gguf    for llama.cpp's --lora
"""
_VERIFY_EPILOG = """\b
Examples:
  gptc verify runs/tiny-stories
  gptc verify stories.gguf
  gptc verify data/books --json
"""


@click.command("import", cls=Command, help=_IMPORT_HELP, epilog=_IMPORT_EPILOG)
@click.argument("path", type=click.Path())
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="CKPT",
    help="Folder for the checkpoint.",
)
@click.option(
    "--tokenizer",
    metavar="KIND",
    shell_complete=complete,
    help="Tokenizer, if the file has none: bytes, gpt2, a tokenizer.json or a .model.",
)
@click.option(
    "--n-head", type=COUNT, metavar="N", help="Number of heads, for markusheimerl/gpt.  [8]"
)
@click.option(
    "--seq-len", type=COUNT, metavar="N", help="Longest sequence, for markusheimerl/gpt.  [1024]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_command(
    path: str,
    out: Path,
    tokenizer: str | None,
    n_head: int | None,
    seq_len: int | None,
    as_json: bool,
) -> None:
    """Convert the model at PATH to a checkpoint."""
    from gptc.checkpoint.find import tokenizer_name
    from gptc.convert.import_model import WITHOUT_TOKENIZER, import_model
    from gptc.tokenizer.registry import make_tokenizer

    assumed = {"n_head": n_head, "block_size": seq_len}
    given = {name: value for name, value in assumed.items() if value is not None}
    chosen = make_tokenizer(tokenizer_name(tokenizer)) if tokenizer is not None else None
    imported = import_model(path, out, chosen, **given)
    for note in imported.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        config = imported.config.to_dict()
        found = {"path": path, "format": imported.format, "checkpoint": str(out), "config": config}
        click.echo(json.dumps({**found, "optimizer_step": imported.optimizer_step}, indent=2))
        return
    click.echo(f"{path} ({imported.format}) is now the checkpoint {out}")
    if not any(note.startswith(WITHOUT_TOKENIZER) for note in imported.notes):
        click.echo(f"next: gptc infer -m {quoted(out)}", err=True)


@click.command("export", cls=Command, epilog=_EXPORT_EPILOG)
@model_option
@click.option(
    "--to", required=True, metavar="FORMAT", shell_complete=complete, help=f"Format: {_WRITTEN}."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Output file, or for hf the folder.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    shell_complete=complete,
    help=f"Data type: {_dtypes_help()}.  [fp32; a packed model stays packed in gguf]",
)
@click.option(
    "--file-version",
    type=SizeParam(max=2),
    metavar="N",
    help="Version of the llama2.c file: 0 for run, 2 (int8) for runq.  [by --dtype]",
)
@click.option("--debug-state", is_flag=True, help="Also write llm.c's debug state.")
@click.option(
    "--adapter",
    metavar="PATH",
    type=click.Path(),
    help="Adapter (LoRA) of the model, to be written.",
)
@click.option("--merge", is_flag=True, help="Write adapters into the model that they change.")
@click.option("--weights-only", is_flag=True, help="Leave the tokenizer out.")
@click.option("--force", is_flag=True, help="Replace an existing PATH.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(
    model: str | None,
    to: str,
    out: Path,
    dtype: str | None,
    file_version: int | None,
    debug_state: bool,
    adapter: str | None,
    merge: bool,
    weights_only: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model in the format of another program.

    gptc reads the file back and compares its logits for a fixed prompt with the original's. The
    tokenizer goes into the file (gguf), the folder (hf) or a file next to it.
    """
    from gptc.checkpoint.facade import on_newest
    from gptc.checkpoint.merged import adapted, merged
    from gptc.convert.export_adapter import export_adapter

    def write(file: ModelFile) -> ExportReport:
        base, adapters = adapted(file, adapter)
        if adapters is not None and not merge:
            export_adapter(base, adapters, to, out, replace=force)
            return ExportReport(out, to, "fp32", [out])
        return export_model(
            merged(file, adapter) if merge else file,
            to,
            out,
            dtype=dtype.lower() if dtype else None,
            version=file_version,
            debug_state=debug_state,
            replace=force,
            weights_only=weights_only,
        )

    report = on_newest(model, write)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        values = {**vars(report), "path": str(out), "files": [str(file) for file in report.files]}
        click.echo(json.dumps(values, indent=2))
        return
    for file in report.files:
        click.echo(f"wrote {file}")
    if not report.prompt_tokens:
        click.echo("read back: the adapters are the same")
        return
    agree = (
        "are the same"
        if not report.largest_difference
        else (
            f"differ by at most {report.largest_difference:.2g} "
            f"({report.relative_difference:.2g} of their norm)"
        )
    )
    click.echo(f"read back: logits of {report.prompt_tokens} tokens {agree}")


def _verify_options(path: Path) -> None:
    """GptcError for a run's checkpoint with options that `gptc train --resume` would refuse."""
    from gptc.checkpoint.find import open_folder
    from gptc.checkpoint.names import ADAPTER, CONFIG, list_checkpoints
    from gptc.training.resolve import stored_options

    is_one = (path / CONFIG).is_file() or (path / ADAPTER).is_file()
    for folder in [path] if is_one else list_checkpoints(path):
        checkpoint = open_folder(folder)
        if "options" in (checkpoint.trainer() or {}):
            stored_options(checkpoint)


@click.command("verify", cls=Command, epilog=_VERIFY_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify_command(path: Path, as_json: bool) -> None:
    """Check the structure, bounds, numbers and checksums of a file or folder.

    PATH is a model in any known format, a checkpoint, a run, a dataset, a shard or a tokenizer of
    llm.c. The exit code is 1 if a check fails.
    """
    from gptc.convert.verify import verify

    found = verify(path)
    _verify_options(path)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    click.echo(f"{path}: {found['format']}, nothing wrong")
    for line in found["checks"]:
        click.echo(f"  {line}")
