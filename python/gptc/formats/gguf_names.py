"""The names of the tensors of GGUF files. A matrix is (out, in) as ours."""

from __future__ import annotations

from gptc.formats import layout
from gptc.formats.families import Family
from gptc.formats.layout import Naming


def naming(family: Family) -> Naming:
    """The names of a family's tensors."""
    return Naming(layout.with_leaves(family.gguf_stems), paired=family.paired)
