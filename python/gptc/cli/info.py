"""`gptc info`: describes a run, a folder of runs, a checkpoint, a model, a dataset or a shard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptc.cli.command import Command
from gptc.data.options import PACKING, TRAIN_ON, TrainOn
from gptc.errors import GptcError, NoTokenizer, printable

if TYPE_CHECKING:
    from gptc.formats.model_file import ModelFile

_EPILOG = """\b
Examples:
  gptc info runs                                    all runs, the newest first
  gptc info runs/tiny-stories
  gptc info runs/tiny-stories/ckpt-001000 --json
  gptc info data/books
  gptc info data/chats --show-mask
  gptc info data/books/val_000000.bin
  gptc info stories15M.bin
"""


@click.command("info", cls=Command, epilog=_EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--show-mask",
    is_flag=True,
    help="Print the first conversations of a dataset; tokens that are not learned are dim (on a "
    "terminal), those that are learned are in brackets (elsewhere).",
)
@click.option(
    "--train-on",
    type=click.Choice(TRAIN_ON),
    default="assistant",
    help="Tokens that are learned, for --show-mask.  [assistant]",
)
def info_command(path: Path, as_json: bool, show_mask: bool, train_on: TrainOn) -> None:
    """Describe PATH: a run, a folder of runs, a checkpoint, a model in any format, a dataset or
    a shard."""
    if show_mask:
        from gptc.cli.masks import show_masks

        show_masks(path, train_on)
        return
    found = describe(path)
    click.echo(_json(found) if as_json else _table(found))


def describe(path: Path) -> dict[str, Any]:
    """The facts about `path`; "kind" says whether it is a run, a model, and so on."""
    from gptc.checkpoint.names import ADAPTER, CONFIG
    from gptc.cli.runs import describe_runs, is_run
    from gptc.data.dataset import Dataset
    from gptc.data.description import DATASET_FILE
    from gptc.eval.ngram_file import is_ngrams, open_ngrams
    from gptc.files.whole import restore
    from gptc.formats.registry import is_foreign, open_model

    restore(path)
    if not path.exists():
        raise GptcError(f"{path} does not exist; name a run, a checkpoint, a dataset or a shard")
    if path.is_file():
        return _describe_file(path)
    if (path / CONFIG).is_file() or (path / ADAPTER).is_file():
        return {"kind": "checkpoint", **_describe_checkpoint(path)}
    if is_foreign(path):
        return {"kind": "model", **_describe_model(open_model(path))}
    if is_ngrams(path):
        return {"kind": "n-grams", **open_ngrams(path).describe()}
    if (path / DATASET_FILE).is_file():
        return {"kind": "dataset", **Dataset.open(path).describe()}
    if is_run(path):
        return {"kind": "run", **_describe_run(path)}
    if runs := describe_runs(path):
        return {"kind": "runs", "path": str(path), "runs": runs}
    raise GptcError(
        f"{path} is not a run, checkpoint or dataset; make one with gptc train or gptc prepare"
    )


def _describe_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from gptc.formats.safetensors import TensorFile

        shapes = TensorFile(path).shapes
        return {"kind": "safetensors", "path": str(path), "tensors": dict(shapes.items())}
    from gptc.data.shards import is_shard, open_shard
    from gptc.formats.registry import open_model

    if not is_shard(path):
        return {"kind": "model", **_describe_model(open_model(path))}
    shard = open_shard(path)
    return {
        "kind": "shard",
        "path": str(path),
        "tokens": shard.n_tokens,
        "bytes_per_number": shard.dtype.itemsize,
        "largest_token": shard.largest() if shard.n_tokens else None,
        "first_tokens": shard.read(0, min(16, shard.n_tokens)).tolist(),
    }


def _describe_run(path: Path) -> dict[str, Any]:
    from gptc.checkpoint.find import find_checkpoint
    from gptc.checkpoint.metrics import METRICS, read_records
    from gptc.checkpoint.names import BEST, list_checkpoints

    names = [folder.name for folder in list_checkpoints(path)]
    run: dict[str, Any] = {"path": str(path), "checkpoints": names}
    if (path / BEST).is_dir():
        run["best"] = (path / BEST).resolve().name
    lines = read_records(path / METRICS)
    if lines:
        run["last_metrics"] = lines[-1]
        evaluations = [line for line in lines if "val_loss" in line]
        if evaluations:
            run["last_evaluation"] = evaluations[-1]
    if names:
        run["newest"] = _describe_checkpoint(find_checkpoint(path))
    return run


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from gptc.checkpoint.find import open_folder
    from gptc.formats import hf

    checkpoint = open_folder(path)
    described = _describe_model(checkpoint)
    described["format"] = hf.model_type(checkpoint.config)
    if (lora := checkpoint.lora) is not None:
        described["adapter"] = {
            "rank": lora.rank,
            "alpha": lora.alpha,
            "kind": lora.kind,
            "dora": lora.dora,
            "targets": list(lora.targets),
            "parameters": sum(math.prod(p.shape) for p in checkpoint.trained()),
        }
    trainer = checkpoint.trainer()
    if trainer is not None and "options" in trainer:
        names = ("step", "tokens", "elapsed_s", "evaluation", "best_val_loss", "gptc_version")
        described["training"] = {name: trainer[name] for name in names}
        data = trainer["options"]["data"]
        described["training"]["data"] = data if isinstance(data, str) else ", ".join(data)
        described["training"]["steps"] = trainer["options"]["steps"]
        described["training"]["packing"] = trainer["options"].get("packing", "stream")
    return described


def _describe_model(model: ModelFile) -> dict[str, Any]:
    """The facts about a model in any format."""
    from gptc.formats import families

    config, path = model.config, model.path
    parts: dict[str, int] = {}
    for name, shape, _ in config.parameters():
        size = 1
        for n in shape:
            size *= n
        part = _part(name)
        parts[part] = parts.get(part, 0) + size
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    types = model.types()
    return {
        "path": str(path),
        "family": families.name(config),
        "format": model.format,
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "config": config.to_dict(),
        **_tokenizer(model),
        "types": {name: {"tensors": n, "bytes": size} for name, (n, size) in types.items()},
        "notes": list(model.notes),
        "files": {f.name: f.stat().st_size for f in files if f.is_file()},
    }


def _part(name: str) -> str:
    for part, mark in (("attention", ".attn."), ("feed-forward", ".mlp.")):
        if mark in name:
            return part
    names = {"wte": "token embedding", "wpe": "position embedding", "lm_head": "output head"}
    return names.get(name.split(".")[0], "norms")


def _tokenizer(model: ModelFile) -> dict[str, Any]:
    """The tokenizer in words, the tokens that end a text, and the names of chat templates."""
    try:
        tokenizer = model.tokenizer()
    except NoTokenizer:
        return {"tokenizer": None}
    except GptcError as error:
        return {"tokenizer": f"not readable: {error}"}

    def name(id: int) -> str:
        return tokenizer.pieces[id].decode("utf-8", "replace")

    begin = "" if tokenizer.bos is None else f", {name(tokenizer.bos)} before a text"
    return {
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens{begin}",
        "ends": {name(id): id for id in tokenizer.all_ends},
        "chat_templates": list(tokenizer.marks.templates),
    }


# ---- as text: names and texts from files must not control the terminal ----


def _json(found: dict[str, Any]) -> str:
    text = json.dumps(found, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _table(found: dict[str, Any]) -> str:
    from gptc.cli.runs import runs_table

    rows: list[tuple[str, str]] = []
    kind = found["kind"]
    if kind == "runs":
        return "\n".join(map(printable, runs_table(found["runs"])))
    if kind == "run":
        last = found["checkpoints"][-1] if found["checkpoints"] else "none yet"
        rows.append(("run", found["path"]))
        rows.append(("checkpoints", f"{len(found['checkpoints'])}, newest {last}"))
        if "best" in found:
            rows.append(("best", found["best"]))
        if "last_metrics" in found:
            rows.append(("last step", _metrics_line(found["last_metrics"])))
        if "newest" in found:
            rows += _checkpoint_rows(found["newest"])
    elif kind in ("checkpoint", "model"):
        rows.append((kind, found["path"]))
        rows += _checkpoint_rows(found)
    elif kind == "dataset":
        rows = _dataset_rows(found)
    elif kind == "n-grams":
        sizes = ", ".join(f"{size:,}" for size in found["ngrams"])
        rows = [
            ("n-grams", found["path"]),
            ("order", f"{found['order']}, Kneser-Ney"),
            ("made by", found["created_by"]),
            ("data", f"{found['counted_tokens']:,} tokens of {found['data']}"),
            ("tokenizer", f"{found['tokenizer']}, {found['vocab_size']:,} tokens"),
            ("different", f"{sizes} by order"),
        ]
    elif kind == "shard":
        rows = [
            ("shard", found["path"]),
            ("tokens", f"{found['tokens']:,} of {found['bytes_per_number']} bytes each"),
            ("largest", str(found["largest_token"])),
            ("first", " ".join(map(str, found["first_tokens"]))),
        ]
    else:
        rows = [("safetensors", found["path"])]
        rows += [(name, " x ".join(map(str, shape))) for name, shape in found["tensors"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(printable(f"{name:<{width}}  {value}") for name, value in rows)


def _metrics_line(line: dict[str, Any]) -> str:
    from gptc.files.words import duration

    return (
        f"{line['step']:,}, {line['tokens']:,} tokens, {duration(line['elapsed_s'])}, "
        f"train loss {line['train_loss']:.4f}"
    )


def _measures(evaluation: dict[str, Any]) -> str:
    """The other results of an evaluation."""
    if "val_bpb" in evaluation:
        return f", {evaluation['val_bpb']:.3f} bits per byte"
    return f", accuracy {evaluation['val_accuracy']:.0%}, margin {evaluation['val_margin']:.3f}"


def _experts(config: dict[str, Any]) -> str:
    if not config.get("n_expert"):
        return ""
    return f"{config['n_expert_used']} of {config['n_expert']} experts of "


def _checkpoint_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from gptc.files.words import amount, plural
    from gptc.formats.families import FAMILIES

    config, total = found["config"], found["parameters"]
    heads = plural(config["n_head"], "head")
    if config["n_kv_head"] != config["n_head"]:
        heads += f" ({config['n_kv_head']} for keys and values)"
    if size := config.get("head_dim"):
        heads += f" of {size} channels"
    classes = {family.model_type: family.model_class for family in FAMILIES}
    names = {**classes, "gptc": "gptc's own"}
    stored = names.get(found["format"], f"a file of {found['format']}")
    rows = [
        ("family", f"{found['family']}, stored as {stored}"),
        (
            "shape",
            f"{plural(config['n_layer'], 'layer')}, {heads}, width {config['n_embd']}, "
            f"feed-forward {_experts(config)}{config['n_ff']}, context {config['block_size']}",
        ),
        (
            "layers",
            f"{config['norm']}, {config['pos']} positions, {config['activation']}, "
            f"{_biases(config)}, {'tied' if config['tied'] else 'untied'} output head",
        ),
        *_attention_rows(config),
        ("vocabulary", f"{config['vocab_size']:,} ({found['tokenizer'] or 'no tokenizer'})"),
    ]
    if found.get("ends"):
        ends = (f"{name} ({id})" for name, id in found["ends"].items())
        rows.append(("ends of text", ", ".join(ends)))
    if found.get("chat_templates"):
        rows.append(("chat template", ", ".join(found["chat_templates"])))
    if adapter := found.get("adapter"):
        kind = "" if adapter["kind"] == "plain" else f", {adapter['kind']}"
        rows.append(
            (
                "adapter",
                f"rank {adapter['rank']}, alpha {adapter['alpha']:g}{kind}, of "
                f"{', '.join(adapter['targets'])}: {adapter['parameters']:,} parameters",
            )
        )
    rows += [("note", note) for note in found["notes"]]
    if "training" in found:
        training = found["training"]
        padded = " with padding" if training["packing"] in PACKING else ""  # conversations
        rows.append(
            (
                "training",
                f"step {training['step']:,} of {training['steps']:,}, "
                f"{training['tokens']:,} tokens{padded} of {training['data']}",
            )
        )
        if training["evaluation"]:
            evaluation, best = training["evaluation"], training["best_val_loss"]
            told = "" if best is None else f"; best loss {best:.4f}"
            told = f"loss {evaluation['val_loss']:.4f}{_measures(evaluation)}{told}"
            rows.append(("evaluation", told))
    rows.append(("parameters", f"{total:,}"))
    rows += [
        (f"  {part}", f"{size:>{len(f'{total:,}')},}  {size / total:6.1%}")
        for part, size in found["parameters_by_part"].items()
    ]
    if found["types"]:
        rows.append(("tensors", f"{sum(kind['tensors'] for kind in found['types'].values()):,}"))
    rows += [
        (f"  {name}", f"{kind['tensors']:,}, {amount(kind['bytes'])}")
        for name, kind in found["types"].items()
    ]
    rows.append(("files", amount(sum(found["files"].values()))))
    rows += [(f"  {name}", amount(size)) for name, size in found["files"].items()]
    return rows


def _biases(config: dict[str, Any]) -> str:
    from gptc.formats.families import BIASES

    words = {"qkv_bias": "queries, keys and values", "attn_proj_bias": "attention's output"}
    words |= {"mlp_bias": "feed-forward", "norm_bias": "norms"}
    some = [words[name] for name in BIASES if config.get(name)]
    if config["bias"]:
        return "biases"
    return f"biases of {', '.join(some)}" if some else "no biases"


def _attention_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What few models have: norms of heads, a window, scaled rotary frequencies."""
    found = ["norms of queries and keys"] if config.get("qk_norm") else []
    words = {
        "wide_qk_norm": "norms of all queries and all keys",
        "parallel": "parallel to the feed-forward layer",
        "one_norm": "with one norm for both",
        "score_by_layer": "scores divided by the layer's number",
    }
    found += [text for name, text in words.items() if config.get(name)]
    if at := config.get("norm_at"):
        found.append("norms after the branches" if at == "after" else "norms around the branches")
    numbers = {
        "rope_dim": "rotated channels",
        "score_scale": "as scale of scores",
        "score_cap": "as soft cap of scores",
        "logit_cap": "as soft cap of logits",
    }
    for name, text in numbers.items():
        if value := config.get(name):
            found.append(f"{value:g} {text}")
    if layers := config.get("layers"):
        rotated = sum(layer["rope"] for layer in layers)
        windowed = sum(layer["window"] > 0 for layer in layers)
        found.append(f"{rotated} of {len(layers)} layers with rotation, {windowed} with a window")
    if window := config.get("window"):
        found.append(f"window of {window:,} tokens")
    if (scaling := config.get("rope_scaling", "none")) != "none":
        original = f" from {size:,} tokens" if (size := config["rope_original"]) else ""
        by = f" by {factor:g}" if (factor := config["rope_factor"]) else ""
        found.append(f"{scaling} rotary scaling{by}{original}")
    return [("attention", ", ".join(found))] if found else []


def _dataset_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from gptc.data.dataset import counts, drawn
    from gptc.files.words import plural

    sources = [source["source"] + counts(source) for source in found["sources"]]
    rows = [
        ("dataset", found["folder"]),
        ("made by", found["created_by"]),
        ("sources", "; ".join(sources)),
        ("tokenizer", f"{found['tokenizer']}, {found['vocab_size']:,} tokens"),
    ]
    for split, part in found["splits"].items():
        shards = plural(part["shards"], "shard")
        rows += [
            (
                split,
                f"{part['tokens']:,} tokens in {shards}, "
                f"{part['bytes_per_token']:.2f} bytes per token{drawn(part)}",
            ),
            ("  uses", f"{part['vocab_used']:,} different tokens"),
            ("  begins", json.dumps(part["sample"][:120], ensure_ascii=False)),
        ]
    return rows
