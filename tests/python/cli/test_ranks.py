"""Commands that several ranks run together: what they print is that of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpi_jobs import job, needs_mpi


@needs_mpi
def test_two_ranks_print_what_one_process_prints(
    gptc: Callable[..., Any], saved: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines: list[Any] = ["Once", {"prompt": "two", "num_samples": 2}, {"no": "prompt"}, "", "four"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = ["-m", str(saved), "--device", "cpu", "--dtype", "fp32", "--threads", "1"]
    answering = ["infer", *shared, "--seed", "4", "--max-tokens", "6", "--prompts"]
    commands = {
        "eval": ["eval", *shared, "--data", str(dataset_folder), "--batch-size", "3", "--json"],
        "infer": [*answering, str(prompts)],
        "stdin": [*answering, "-"],
        "lost": ["eval", *shared, "--data", str(tmp_path / "none")],
    }
    ran = job(tmp_path, commands, "commands")
    assert ran.returncode == 0, ran.stderr
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert all(found[1:] == ["", ""] for found in second.values())
    for name, code in {"eval": 0, "infer": 1, "stdin": 1, "lost": 1}.items():
        assert first[name][0] == second[name][0] == code
        assert len(first[name][2].splitlines()) == code
        if name != "stdin":  # which one process reads
            alone = gptc(*commands[name])
            assert first[name] == [alone.code, alone.out, alone.err]
    assert "2 ranks share the lines of a file" in first["stdin"][2]
