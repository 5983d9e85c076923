"""tools/gpu/check_spills.py finds the spills and stacks that ptxas -v prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools" / "gpu" / "check_spills.py"

STEP = "[1/9] Building CUDA object CMakeFiles/cuda_{dtype}.dir/csrc/cuda/{file}.cu.o\n"
KERNEL = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z11norm_kernelILi8ELi64EEv9norm_args' for 'sm_{arch}'
ptxas info    : Function properties for _Z11norm_kernelILi8ELi64EEv9norm_args
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, {stack} bytes cumulative stack size
"""
HOT = ("attention_bf16", "small_bf16", "vector_attention_bf16")
HOT_KERNELS = (
    "attention_decode_kernel",
    "classifier_kernel",
    "expert_product_kernel",
    "few_expert_kernel",
    "few_norm_forward_kernel",
    "few_product_kernel",
    "residual_norm_backward_kernel",
    "residual_norm_forward_kernel",
    "rows_product_kernel",
    "wide_norm_backward_kernel",
)


def log(stack: int = 0, spill: int = 0, file: str = "small_bf16", dtype: str = "bf16") -> str:
    """A build log in which one kernel of one file has these values, and all others are fine."""
    text = "".join(
        STEP.format(dtype="bf16", file=name) + KERNEL.format(arch=80, stack=0, spill=0)
        for name in HOT
    ) + "".join(
        KERNEL.format(arch=80, stack=0, spill=0).replace("11norm_kernel", f"{len(name)}{name}")
        for name in HOT_KERNELS
    )
    return (
        text
        + STEP.format(dtype=dtype, file=file)
        + KERNEL.format(arch=90, stack=stack, spill=spill)
    )


def run(tmp_path: Path, text: str) -> tuple[int, str]:
    (tmp_path / "log").write_text(text)
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path / "log"], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_all_is_well(tmp_path: Path) -> None:
    code, out = run(tmp_path, log())
    assert code == 0
    assert out.endswith(f"{len(HOT) + len(HOT_KERNELS) + 1} hot kernels, 0 of them spill\n")
    assert "sm_90    small_bf16: norm_kernel<8, 64>, 40 registers\n" in out


def test_a_spill_and_a_stack_are_failures(tmp_path: Path) -> None:
    code, out = run(tmp_path, log(stack=8, spill=4))
    assert code == 1
    assert "SPILLS sm_90    small_bf16: norm_kernel<8, 64>, 40 registers, 8 B of stack, 8 B" in out
    assert run(tmp_path, log(stack=16))[0] == 1


def test_products_that_run_one_by_one_are_a_failure(tmp_path: Path) -> None:
    remark = (
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the function "
        "'_Z11norm_kernelILi8ELi64EEv9norm_args'\n"
    )
    code, out = run(tmp_path, log() + remark)
    assert code == 1
    assert "WAITS  norm_kernel<8, 64>: its warpgroup's products run one by one\n" in out


def test_other_kernels_may(tmp_path: Path) -> None:
    assert run(tmp_path, log(stack=8, spill=4, file="linear"))[0] == 0
    assert run(tmp_path, log(stack=8, spill=4, dtype="fp32"))[0] == 0


def test_a_log_without_kernels_proves_nothing(tmp_path: Path) -> None:
    code, out = run(tmp_path, "ninja: no work to do.\n")
    assert code == 1
    assert f"none of {', '.join(sorted((*HOT, *HOT_KERNELS)))}:" in out


def test_a_hot_kernel_of_a_file_that_is_not_checked_is_missing(tmp_path: Path) -> None:
    code, out = run(tmp_path, log().replace("17classifier_kernel", "17otherwise__kernel"))
    assert code == 1
    assert "none of classifier_kernel:" in out
