"""Builds this folder's C files with the system's compiler on first use; the user's cache folder keeps the library."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = ("decoding.c", "step.c", "training.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
# PyTorch's OpenMP is in the process already and a second one would fight it for the cores: -fopenmp is for compiling
# alone, and what it leaves undefined is found in PyTorch's when the library is loaded. Not all compilers take it.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
ARGUMENTS = {
    **{f"linear_{number}": (c_void_p,) * 3 + (c_int64,) * 3 + (c_int,) for number in ("fp32", "bf16")},
    "linear_int8": (c_void_p,) * 4 + (c_int64,) * 3 + (c_int,),
    "rms_norm": (c_void_p,) * 3 + (c_int64,) * 2 + (c_float,),
    "route": (c_void_p,) * 5 + (c_int64,) * 3,
    "experts_mlp_fp32": (c_void_p,) * 7 + (c_int64,) * 5 + (c_int,),
    "experts_mlp_int8": (c_void_p,) * 9 + (c_int64,) * 5 + (c_int,),
    "lightning_step": (c_void_p,) * 6 + (c_int64,) * 6 + (c_int,),
    "step_scratch": (c_void_p,),
    **{
        f"step_{number}": (c_void_p,) * 4 + (c_int64, c_void_p, c_float) + (c_void_p,) * 3
        for number in ("fp32", "bf16", "int8")
    },
    **{
        f"{name}_{number}": arguments
        for number in ("fp32", "bf16")
        for name, arguments in {
            "swiglu": (c_void_p,) * 2 + (c_int64,) * 2 + (c_int,),
            "swiglu_backward": (c_void_p,) * 6 + (c_int64,) * 2 + (c_int,),
            "rms_norm_forward": (c_void_p,) * 4 + (c_int64,) * 2 + (c_float, c_int),
            "rms_norm_backward": (c_void_p,) * 6 + (c_int64,) * 2 + (c_int,),
            "causal_softmax": (c_void_p,) + (c_int64,) * 2 + (c_float, c_int),
            "causal_softmax_backward": (c_void_p,) * 2 + (c_int64,) * 2 + (c_float, c_int),
            "scan_states": (c_void_p,) * 6 + (c_int64,) * 3 + (c_int,) * 2,
            "cross_entropy": (c_void_p,) * 3 + (c_int64,) * 3 + (c_int,),
        }.items()
    },
}
RESULTS = {"step_scratch": c_int64}
DIGEST = hashlib.sha256().digest_size


def new_empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that a kernel may write to, whatever PyTorch's default device and dtype are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built if it is not in the cache folder; None, after one warning, where it cannot be had."""
    try:
        return _load_or_build()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"fulmen's C kernels for the CPU cannot be built, PyTorch's slower forms run instead: {error}", stacklevel=2
        )
        return None


def _load_or_build() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C compiler on the PATH (looked for {', '.join(COMPILERS)})")
    problem = ""
    for variant in VARIANTS:
        try:
            return _open(_cached([compiler, *FLAGS, *variant]))
        except subprocess.CalledProcessError as error:
            problem = problem or (error.stderr.strip().splitlines() or [str(error)])[0]
        except OSError as error:
            problem = problem or str(error)
    raise OSError(problem)


def _cached(compile_command: list[str]) -> Path:
    """The library that this compiler makes for this processor, from the cache folder or newly built."""
    # The predefined macros name the compiler's version and what the processor can do.
    macros = _run([*compile_command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256("\0".join((*compile_command, macros)).encode() + _sources()).hexdigest()
    path = _cache_folder() / f"kernels-{key[:32]}.so"
    if not _is_whole(path):
        _build(compile_command, path)
    return path


def _sources() -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]")))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fulmen"


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of what comes before: opening half a library can kill the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _build(compile_command: list[str], path: Path) -> None:
    """Build aside and move into place, so that two processes at once do not meet a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        linked, compiled = Path(folder, "kernels.so"), []
        for source in SOURCES:
            compiled.append(f"{folder}/{source}.o")
            _run([*compile_command, "-c", str(FOLDER / source), "-o", compiled[-1]])
        _run([compile_command[0], "-shared", *compiled, "-o", str(linked), "-lm"])
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(linked, path)


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _open(path: Path) -> ctypes.CDLL:
    # All names are resolved now: a missing one must fail here and not in the middle of a step.
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, RESULTS.get(name)
    return library
