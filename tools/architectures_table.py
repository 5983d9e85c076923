"""Writes docs/architectures.md from the rows of formats/families.py and the models of the tests.

python tools/architectures_table.py            # --check compares only
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))

import reference
from gptc.formats.families import BIASES, FAMILIES, Family

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HEAD = """# Architectures

`python tools/architectures_table.py` writes this page from the rows of
`python/gptc/formats/families.py`, which readers and writers follow, and from the models of
`tests/python/reference.py`; those in bold have golden files. [formats.md](formats.md#families) has
how far each of these models is from transformers. A flag in code style is the key of config.json
that decides. [CONTRIBUTING.md](../CONTRIBUTING.md#add-an-architecture) tells how to add a row.

"""
# Of a row: those that say how files are written, and those that have columns.
_FILES = {"model_type", "model_class", "gguf", "paper", "activation_key", "eps_key", "theta_key"}
_FILES |= {
    "stems",
    "gguf_stems",
    "defaults",
    "paired",
    "paired_folder",
    "gpt2_keys",
    "interleaved",
    "pad",
    "divided",
    "period",
}
_FILES |= {"window_switch", "norms_from_one", "plain", "expert_width_key"}
_FILES |= {"paired_folder", "gpt2_keys", "own_head"}
_SHOWN = {"norm", "pos", "activations", "norm_at", *BIASES}


def flags(family: Family) -> Iterator[str]:
    """What a row says about the model."""
    yield f"{family.norm} {family.norm_at}"
    yield {"rope": "rotary", "learned": "learned positions"}[family.pos]
    yield " or ".join(dict.fromkeys(family.activations.values()))
    has = [name.removesuffix("_bias") for name in BIASES if getattr(family, name) is True]
    asks = {
        getattr(family, name): None for name in BIASES if isinstance(getattr(family, name), str)
    }
    if len(has) == len(BIASES):
        yield "all biases"
    elif has:
        yield f"biases: {', '.join(has)}"
    yield from (f"`{key}`" for key in asks)
    for one in fields(family):
        value = getattr(family, one.name)
        if one.name in _FILES | _SHOWN or one.default is MISSING or value == one.default:
            continue
        if value is False:
            yield f"not {one.name}"
        else:
            yield f"`{value}`" if isinstance(value, str) else one.name


def tested(family: Family) -> str:
    """The models of the tests of a family; those in bold have a golden file."""
    cases = [*reference.CASES, *reference.ARCHITECTURES, *reference.OTHERS, *reference.FAMILIES]
    own = [case for case in cases if case.kind == family.model_type]
    return ", ".join(
        f"**{case.name}**" if reference.golden_path(case).exists() else case.name for case in own
    )


def page() -> str:
    """The page as Markdown."""
    lines = ["| `model_type` | GGUF | flags | paper or card | tested |", "| --- " * 5 + "|"]
    for family in FAMILIES:
        cells = (family.model_type, family.gguf or "none", "; ".join(flags(family)), family.paper)
        lines.append(f"| {' | '.join(cells)} | {tested(family)} |")
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not current: run python tools/architectures_table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
