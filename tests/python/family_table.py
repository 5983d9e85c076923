"""A pytest plugin: `pytest -m parity --family-table` writes the table of docs/formats.md.

The tests of test_parity.py record how far each model of reference.py is from transformers; the
table has these numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import reference

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- family table: begin -->\n", "<!-- family table: end -->"
COLUMNS = ("folder in", "logits", "gradients", "ten steps", "greedy", "folder out")
COLUMNS += ("GGUF in", "GGUF out")
CASES = [*reference.CASES, *reference.OTHERS, *reference.FAMILIES, *reference.ARCHITECTURES]
# llama.cpp computes no such models; then transformers reads no GGUF files of these families.
_NOT_IN_GGUF = ("llama-dynamic", "cerebras-gpt", "gpt2-relu", "smollm3-list", "gemma3-types")
_NOT_IN_GGUF += ("neox-in-turn", "qwen3-biases", "gemma2-plain", "qwen3-moe-odds")
_NOT_IN_GGUF += ("gptj", "phi-grouped")
_NO_READER = ("smollm3", "pythia", "olmo2", "mixtral", "phi")
MISSING = {(name, column) for name in _NOT_IN_GGUF for column in COLUMNS[-2:]}
MISSING |= {(name, COLUMNS[-1]) for name in _NO_READER}
_FLAGS = ("attention_bias", "mlp_bias", "use_qkv_bias", "scale_attn_by_inverse_layer_idx")
_FLAGS += ("output_router_logits", "norm_topk_prob")
_CHOICES = ("activation_function", "hidden_act", "rotary_pct", "use_parallel_residual")
_CHOICES += ("partial_rotary_factor", "rotary_dim")
_CHOICES += ("no_rope_layers", "layer_types", "query_pre_attn_scalar")
_CHOICES += ("attn_logit_softcapping", "final_logit_softcapping")
found: dict[tuple[str, str], float | str] = {}


def features(case: reference.Case) -> str:
    """What a model has that the plainest of its family lacks."""
    config, names = case.config, []
    names += [name for name in _FLAGS if config.get(name)]
    if size := config.get("head_dim"):
        names.append(f"heads of {size}")
    elif case.kind in reference.GPT2_KEYS:
        names.append(f"heads of {config['n_embd'] // config['n_head']}")
    names += [f"{key}: {config[key]}" for key in _CHOICES if key in config]
    if "sliding_window" in config and case.kind not in ("gemma2", "gemma3_text"):
        names.append(f"window {config['sliding_window'] or 'null'}")
    if experts := config.get("num_local_experts", config.get("num_experts")):
        names.append(f"{config['num_experts_per_tok']} of {experts} experts")
    for key in ("rope_scaling", "rope_parameters"):
        if rope := config.get(key):
            names.append(f"{key}: {rope.get('rope_type', rope.get('type'))}")
    if config.get("tie_word_embeddings"):
        names.append("tied")
    return ", ".join(names)


def cell(case: str, column: str) -> str:
    if (case, column) in MISSING:
        return "none"
    value = found.get((case, column), "?")
    if isinstance(value, str):
        return value
    return "same bits" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def table() -> str:
    """The table as Markdown. "?" is in the place of a test that did not run or failed."""
    lines = [
        f"| model | family | with | {' | '.join(COLUMNS)} |",
        "| --- " * (len(COLUMNS) + 3) + "|",
    ]
    for case in CASES:
        cells = [case.name, case.kind, features(case)]
        cells += [cell(case.name, column) for column in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parts_of_page() -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    inside, end, after = rest.partition(END)
    assert begin
    assert end
    return before + begin, inside, end + after


# ---- the plugin ----


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family-table", action="store_true", help="write docs/formats.md's table")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("[")[2].removesuffix("]").removeprefix("live-")
    if report.when == "call" and report.passed and "test_parity.py" in report.nodeid:
        for column, value in report.user_properties:
            if column in COLUMNS:
                found[name, column] = value


def pytest_sessionfinish(session: Any) -> None:
    if session.config.getoption("--family-table") and not hasattr(session.config, "workerinput"):
        before, _, after = parts_of_page()
        PAGE.write_text(before + table() + after, encoding="utf-8")
