"""The library is found, declared and opened, and its statuses become exceptions."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptc
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.errors import EngineError, GptcError


@pytest.fixture
def _reload() -> Iterator[None]:
    """Lets a test open the library again, and reopens the usual one afterwards."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def test_declarations_are_the_fenced_region_without_comments() -> None:
    header = """
        int before(void);
        /* ==== binding: begin ==== */
        #define GPT_ABI_VERSION 7
        int f(int a); /* says /* no more */
        /* several
           lines */ int g(void);
        /* ==== binding: end ==== */
        int after(void);
    """
    assert library.declarations(header).split() == ["int", "f(int", "a);", "int", "g(void);"]


def test_abi_version_is_read_from_the_header() -> None:
    assert library.abi_version("#define GPT_ABI_VERSION 7\n") == 7
    with pytest.raises(GptcError, match="GPT_ABI_VERSION"):
        library.abi_version("int f(void);")


@pytest.mark.usefixtures("_reload")
def test_another_abi_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = library.find_library()[1].read_text()
    number = library.abi_version(header)
    old = tmp_path / "gpt.h"
    old.write_text(header.replace(f"GPT_ABI_VERSION {number}", "GPT_ABI_VERSION 999"))
    monkeypatch.setenv("GPTC_HEADER", str(old))
    with pytest.raises(GptcError, match=rf"ABI version {number}, but .* declares 999"):
        library.load()


@pytest.mark.usefixtures("_reload")
def test_a_missing_library_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTC_LIBRARY", str(tmp_path / "libgpt.so"))
    with pytest.raises(GptcError, match=r"GPTC_LIBRARY names .* which does not exist"):
        library.load()
    monkeypatch.delenv("GPTC_LIBRARY")
    monkeypatch.setattr(gptc.__spec__, "submodule_search_locations", [str(tmp_path)])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(GptcError, match="pip install"):
        library.load()


@pytest.mark.usefixtures("_reload")
def test_a_damaged_library_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = library.find_library()[1]
    (tmp_path / "libgpt.so").write_bytes(b"not a library")
    monkeypatch.setenv("GPTC_LIBRARY", str(tmp_path / "libgpt.so"))
    monkeypatch.setenv("GPTC_HEADER", str(header))
    with pytest.raises(GptcError, match="does not load"):
        library.load()


def test_a_failed_call_carries_the_engines_sentence_and_status() -> None:
    struct = library.load().ffi.new("gpt_config *")
    with pytest.raises(EngineError, match="vocab_size is 0") as caught:
        library.call("gpt_config_check", struct)
    assert caught.value.status == library.GPT_ERR_ARGUMENT


def test_values_that_c_cannot_hold_are_errors_of_ours() -> None:
    with pytest.raises(GptcError, match="seed is -1"):
        library.new_struct("gpt_options", seed=-1)
    with pytest.raises(GptcError, match="n_head is 4294967296"):
        GPTConfig.preset("tiny", n_head=2**32).check()
    with pytest.raises(GptcError, match="gpt_config_param"):
        library.call(
            "gpt_config_param", GPTConfig.preset("tiny").to_c(), 2**40, library.load().ffi.NULL
        )


def test_statuses_are_the_headers() -> None:
    lib = library.load().lib
    for name in ("GPT_OK", "GPT_ERR_ARGUMENT", "GPT_ERR_MEMORY", "GPT_ERR_DEVICE"):
        assert getattr(library, name) == getattr(lib, name)
    assert lib.GPT_ERR_NUMERIC == library.GPT_ERR_NUMERIC


def test_importing_the_package_loads_neither_numpy_nor_the_library() -> None:
    code = "import sys, gptc, gptc.cli; print({'numpy', 'cffi', 'rich'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


# ---- GPUs ----


def gpu_info(status: int, sentence: str = "", **fields: object) -> Any:
    """A library whose gpt_cuda_info gives this answer."""
    ffi = library.load().ffi

    class Fake:
        def gpt_cuda_info(self, info: Any) -> int:
            for name, value in fields.items():
                setattr(info, name, value)
            return status

        def gpt_last_error(self) -> Any:
            return ffi.new("char[]", sentence.encode())

    return library.Library(ffi, Fake(), Path())


def test_without_a_gpu_the_problem_is_one_sentence_and_the_wheel_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = gpu_info(library.GPT_ERR_DEVICE, "no NVIDIA driver is installed", runtime=13000)
    monkeypatch.setattr(library, "load", lambda: fake)
    monkeypatch.setattr(library, "load_cublas", lambda runtime: pytest.fail("loaded in vain"))
    gpu = library.gpu.__wrapped__()
    assert gpu.problem == "no NVIDIA driver is installed"
    assert (gpu.name, gpu.driver, gpu.runtime) == ("", "", "13.0")


def test_a_gpu_without_cublas_is_looked_at_again_with_the_wheel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = {"name": b"a card", "major": 9, "runtime": 13020, "driver": 12080}
    found = [
        gpu_info(library.GPT_ERR_DEVICE, "libcublasLt.so.13 was not found", **card),
        gpu_info(library.GPT_OK, **card, products=b"13.1.0, somewhere"),
    ]
    asked: list[str] = []
    monkeypatch.setattr(library, "load", lambda: found[len(asked)])
    monkeypatch.setattr(library, "load_cublas", lambda runtime: asked.append(runtime) or Path("it"))
    gpu = library.gpu.__wrapped__()
    assert asked == ["13.2"]
    assert gpu.problem is None
    assert (gpu.products, gpu.capability, gpu.driver) == ("13.1.0, somewhere", "9.0", "12.8")


@pytest.mark.parametrize("folder", ["cu13/lib", "cublas/lib"])
def test_the_wheel_of_cublas_is_found_in_either_of_its_folders(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        library,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]),
    )
    assert library.find_cublas("13.0") is None
    file = tmp_path / folder / "libcublasLt.so.13"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a library")
    assert library.find_cublas("13.0") == file
    assert library.find_cublas("12.8") is None
    assert library.load_cublas("13.0") is None  # it does not load, without an error
    assert library.load_cublas("12.8") is None


def test_what_is_loaded_from_the_wheel_is_then_found_by_name() -> None:
    runtime = library.gpu().runtime or "13.0"
    if library.find_cublas(runtime) is None:
        pytest.skip("needs nvidia-cublas: pip install nvidia-cublas")
    name = f"libcublasLt.so.{runtime.partition('.')[0]}"
    code = (
        "import ctypes; from gptc.engine import library; "
        f"assert library.load_cublas({runtime!r}); ctypes.CDLL({name!r}); print('found')"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "found\n"


# ---- parsed declarations ----


def test_a_parsed_header_serves_its_own_text_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = Path(__file__).resolve().parents[3] / "tools" / "make_binding.py"
    if not tool.exists():
        pytest.skip("needs the source tree")
    header = library.find_library()[1]
    out = tmp_path / "_binding.py"
    subprocess.run([sys.executable, tool, header, out], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("gptc._binding", out)
    assert spec
    assert spec.loader
    binding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(binding)
    monkeypatch.setitem(sys.modules, "gptc._binding", binding)
    text = header.read_text()
    assert library._declared(text) is binding.ffi
    parsed = library._declared(text + "\n")
    assert parsed is not binding.ffi
    for name in ("gpt_config", "gpt_options", "gpt_plan", "gpt_sampling", "gpt_device_info"):
        assert binding.ffi.sizeof(name) == parsed.sizeof(name)
    lib = binding.ffi.dlopen(str(library.find_library()[0]))
    assert lib.gpt_abi_version() == library.abi_version(text)
    assert lib.GPT_DTYPE_INT4 == 3
