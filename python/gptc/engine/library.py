"""The binding: opens libgpt.so with cffi, from the declarations in gpt.h.

The functions between the header's two fences are the interface; cffi releases the interpreter lock
around each call. A built package holds the parsed declarations (tools/make_binding.py); nothing is
compiled.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident, main_thread
from typing import Any, NamedTuple

from gptc.errors import EngineError, GptcError
from gptc.files.paths import cache_folder
from gptc.files.words import pip_install

# enum gpt_status
GPT_OK = 0
GPT_ERR_ARGUMENT = 1
GPT_ERR_MEMORY = 2
GPT_ERR_DEVICE = 3
GPT_ERR_NUMERIC = 4
GPT_ERR_INTERRUPTED = 5
GPT_ERR_FILE = 6
GPT_ERR_COMM = 7

_BEGIN = "==== binding: begin ===="
_END = "==== binding: end ===="


class Library(NamedTuple):
    """The opened library: `ffi` makes C values, `lib` holds its functions and constants."""

    ffi: Any
    lib: Any
    path: Path


def declarations(header: str) -> str:
    """The text between the fences of gpt.h, without comments and preprocessor lines."""
    if _BEGIN not in header or _END not in header:
        raise GptcError("gpt.h has no binding fences; reinstall with: pip install .")
    region = header.split(_BEGIN, 1)[1].split(_END, 1)[0]
    # The fences are inside comments: drop the end of the first and the start of the last.
    region = region.split("*/", 1)[1].rsplit("/*", 1)[0]
    region = re.sub(r"/\*.*?\*/", " ", region, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#.*$", "", region, flags=re.MULTILINE)


def abi_version(header: str) -> int:
    """GPT_ABI_VERSION of a gpt.h."""
    found = re.search(r"^#define\s+GPT_ABI_VERSION\s+(\d+)", header, flags=re.MULTILINE)
    if not found:
        raise GptcError("gpt.h defines no GPT_ABI_VERSION; reinstall with: pip install .")
    return int(found[1])


def fingerprint(header: str) -> str:
    """A hash of gpt.h."""
    return hashlib.sha256(header.encode()).hexdigest()


def _declared(header: str) -> Any:
    """The declarations of gpt.h: those parsed at build time if the header is the same, else new."""
    try:
        binding = import_module("gptc._binding")
        if binding.header == fingerprint(header):
            return binding.ffi
    except ImportError:
        pass
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declarations(header))
    return ffi


def find_library() -> tuple[Path, Path]:
    """The paths of libgpt.so and of the gpt.h that describes it.

    $GPTC_LIBRARY and $GPTC_HEADER name them; else both are in the installed package. A library in
    a build folder uses the csrc/gpt.h of its source tree.
    """
    named = os.environ.get("GPTC_LIBRARY")
    if named:
        library = Path(named).resolve()
        if not library.is_file():
            raise GptcError(
                f"GPTC_LIBRARY names {named}, which does not exist; unset or correct it"
            )
    else:
        # An editable install keeps built files apart from the sources: the package lists both.
        package = find_spec("gptc")
        found = (package.submodule_search_locations or ()) if package else ()
        folders = [*map(Path, found), Path(sysconfig.get_path("platlib")) / "gptc"]
        built = [folder / "libgpt.so" for folder in folders if (folder / "libgpt.so").is_file()]
        if not built:
            raise GptcError("libgpt.so is not in the gptc package; reinstall with: pip install .")
        library = built[0]

    named = os.environ.get("GPTC_HEADER")
    headers = [Path(named)] if named else [library.parent / "gpt.h"]
    if not named:
        headers += [folder / "csrc" / "gpt.h" for folder in library.parents]
        headers.append(Path(__file__).resolve().parents[3] / "csrc" / "gpt.h")
    for header in headers:
        if header.is_file():
            return library, header
    raise GptcError(f"no gpt.h for {library}; set GPTC_HEADER to its path")


def _open(ffi: Any, library: Path) -> Any:
    try:
        return ffi.dlopen(str(library))
    except OSError as error:
        if "openblas" not in str(error):
            raise GptcError(f"{library} does not load: {_reason(error)}") from error
        missing = error
    # The library's search path does not find OpenBLAS (the environment was moved or rebuilt). Once
    # OpenBLAS is loaded in the process, the loader finds it by name.
    try:
        import scipy_openblas32  # type: ignore[import-untyped]

        folder = Path(scipy_openblas32.get_lib_dir())
        blas = next(folder.glob("libscipy_openblas*.so*"))
        # Never closed: the library needs it until the process ends.
        _kept_alive.append(ffi.dlopen(str(blas), ffi.RTLD_NOW | ffi.RTLD_GLOBAL))
        return ffi.dlopen(str(library))
    except (ImportError, OSError, StopIteration):
        raise GptcError(
            f"{library} does not load: {_reason(missing)}; install OpenBLAS with: "
            + pip_install("scipy-openblas32")
        ) from missing


def _reason(error: OSError) -> str:
    """The loader's message, without the two file names that cffi adds."""
    return str(error).partition(".  Additionally, ")[0].rpartition("': ")[2]


_kept_alive: list[Any] = []  # for as long as this library: others, and a function that it calls


def keep_plans() -> None:
    """Names a folder of the cache to the library, where it keeps measured plans (GPTC_TUNE)."""
    if os.environ.get("GPTC_TUNE", "0") == "0" or "GPTC_PLANS" in os.environ:
        return
    try:
        folder = cache_folder() / "plans"
        folder.mkdir(parents=True, exist_ok=True)
    except (GptcError, OSError):
        return  # it measures again
    os.environ["GPTC_PLANS"] = str(folder)


@lru_cache(maxsize=1)
def load() -> Library:
    """Opens the library; later calls return the same one."""
    keep_plans()
    library, header = find_library()
    text = header.read_text("utf-8")
    ffi = _declared(text)
    lib = _open(ffi, library)
    wanted = abi_version(text)
    found = lib.gpt_abi_version()
    if found != wanted:
        raise GptcError(
            f"{library} has ABI version {found}, but {header} declares {wanted}; "
            "rebuild, or reinstall with: pip install ."
        )
    _let_signals_in(ffi, lib)
    return Library(ffi, lib, library)


# ---- Ctrl-C ----

_SIGNALS_EVERY_S = 0.1
_raised: dict[int, BaseException] = {}  # by thread: a signal's handler, during a call
_checks: dict[int, Callable[[], None]] = {}  # by thread: that of `ended_by`
_ending = False  # the interpreter: threads other than the main one are done


def _let_signals_in(ffi: Any, lib: Any) -> None:
    """Lets Python handle signals while the library computes, and end that where a handler raises.

    Between layers the library calls a Python function. That is when Python runs the handlers, in
    the main thread; KeyboardInterrupt ends the call, and `check` raises it again.
    """

    def handle_signals() -> int:
        for _ in range(2):  # the interpreter looks for signals where a loop jumps back
            pass
        _ask()
        return int(_must_end())

    def keep(kind: type[BaseException], error: BaseException, trace: Any) -> int:
        _raised[get_ident()] = error
        return 1

    function = ffi.callback("int(void)", handle_signals, onerror=keep)
    _kept_alive.append(function)
    lib.gpt_set_interrupt(function, _SIGNALS_EVERY_S)


@contextmanager
def ended_by(check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` between layers too, while the library computes for this thread on a CPU.

    An exception from it ends the call, which raises it. At most one `check` a thread.
    """
    _checks[get_ident()] = check
    try:
        yield
    finally:
        del _checks[get_ident()]


def _ask() -> None:
    if check := _checks.get(get_ident()):
        check()


def _must_end() -> bool:
    return _ending and get_ident() != main_thread().ident


def end_other_threads() -> None:
    """Ends calls of all threads but the main one, and those threads at their next call."""
    global _ending
    _ending = True


def end_thread_at_exit() -> None:
    """Ends this thread, if it is not the main one and the interpreter ends."""
    if _must_end():
        raise SystemExit


def check(status: int) -> None:
    """Raises EngineError with the library's message unless `status` is GPT_OK."""
    if status == GPT_ERR_INTERRUPTED and (error := _raised.pop(get_ident(), None)):
        raise error.with_traceback(None)
    if status == GPT_ERR_INTERRUPTED:
        end_thread_at_exit()
    if status != GPT_OK:
        ffi, lib, _ = load()
        message = ffi.string(lib.gpt_last_error()).decode("utf-8", "replace")
        raise EngineError(message or f"libgpt.so failed with status {status}", status)


def value(function: str, *arguments: Any) -> Any:
    """The result of a function. GptcError if an argument overflows in C or is not a number."""
    try:
        return getattr(load().lib, function)(*arguments)
    except (OverflowError, TypeError) as error:
        raise GptcError(f"{function}: {error}") from None


def call(function: str, *arguments: Any) -> None:
    """Calls a function that returns a status, and raises if it fails."""
    check(value(function, *arguments))


def new_struct(kind: str, **fields: int | float) -> Any:
    """A C struct with these fields. GptcError for a value that does not fit its field."""
    ffi = load().ffi
    struct = ffi.new(f"{kind} *")
    for name, value in fields.items():
        try:
            setattr(struct, name, value)
        except OverflowError:
            raise GptcError(f"{name} is {value!r}, out of range") from None
        except TypeError:
            raise GptcError(f"{name} is {value!r}; it must be a number") from None
    return struct


_kept: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def attach(struct: Any, field: str, kind: str, items: Sequence[Any]) -> None:
    """Sets a pointer of a C struct to an array of these structs, which lives as long as it."""
    array = load().ffi.new(f"{kind}[]", len(items))
    for i, item in enumerate(items):
        array[i] = item[0]
    setattr(struct, field, array)
    _kept[struct] = (*_kept.get(struct, ()), array)


def attach_floats(struct: Any, field: str, values: Sequence[float]) -> None:
    """The same for a pointer to numbers."""
    array = load().ffi.new("float[]", list(values))
    setattr(struct, field, array)
    _kept[struct] = (*_kept.get(struct, ()), array)


def version() -> str:
    """The library's version."""
    ffi, lib, _ = load()
    return str(ffi.string(lib.gpt_version()).decode())


def cpu_level() -> str:
    """The instruction set in use: portable, avx2, avx512, avx512vnni, avx512bf16 or amx."""
    ffi, lib, _ = load()
    return str(ffi.string(lib.gpt_cpu_level()).decode())


def cpu_name() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_notice() -> str:
    """A line about CPU features that the system disables; "" if there are none."""
    ffi, lib, _ = load()
    return str(ffi.string(lib.gpt_cpu_notice()).decode())


def cpu_count() -> int:
    """Cores that this process may run on."""
    return int(load().lib.gpt_cpu_count())


# ---- GPUs ----


class Gpu(NamedTuple):
    """The GPU of `--device cuda`; `problem` is the reason why it does not work, or None."""

    problem: str | None
    name: str
    capability: str  # such as "9.0"
    multiprocessors: int
    driver: str  # the newest CUDA that the driver supports, such as "13.0"; "" without a driver
    runtime: str  # the CUDA that the library is built with
    products: str  # version and file of cuBLASLt, "" without it
    memory_bytes: int
    free_bytes: int


@lru_cache(maxsize=1)
def gpu() -> Gpu:
    """The GPU, queried once. Loads cuBLASLt from PyPI if the system has none."""
    found = _look_for_gpu()
    if found.problem and found.name and not found.products and load_cublas(found.runtime):
        found = _look_for_gpu()
    return found


def load_cublas(runtime: str) -> Path | None:
    """Loads cuBLASLt from the wheel nvidia-cublas for this version of CUDA; None without it.

    The engine opens cuBLASLt by name, and the dynamic linker finds the one already loaded.
    """
    file = find_cublas(runtime)
    if file is None:
        return None
    ffi = load().ffi
    try:
        # Never closed: models come and go.
        _kept_alive.append(ffi.dlopen(str(file), ffi.RTLD_NOW | ffi.RTLD_GLOBAL))
    except OSError:
        return None
    return file


def find_cublas(runtime: str) -> Path | None:
    """cuBLASLt in the folders of the wheel nvidia-cublas; None if it is not there."""
    major = runtime.partition(".")[0]
    package = find_spec("nvidia")
    folders = (package.submodule_search_locations or ()) if package else ()
    for folder in folders:
        for inner in (f"cu{major}/lib", "cublas/lib"):
            file = Path(folder, inner, f"libcublasLt.so.{major}")
            if file.is_file():
                return file
    return None


def _look_for_gpu() -> Gpu:
    ffi, lib, _ = load()
    info = ffi.new("gpt_device_info *")
    status = lib.gpt_cuda_info(info)
    return Gpu(
        problem=None if status == GPT_OK else ffi.string(lib.gpt_last_error()).decode(),
        name=ffi.string(info.name).decode(),
        capability=f"{info.major}.{info.minor}" if info.major else "",
        multiprocessors=info.multiprocessors,
        driver=_cuda_version(info.driver),
        runtime=_cuda_version(info.runtime),
        products=ffi.string(info.products).decode(errors="replace"),
        memory_bytes=info.memory_bytes,
        free_bytes=info.free_bytes,
    )


def _cuda_version(number: int) -> str:
    """13000 is "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""
