"""Kernels as machine code: compiled once for this processor, kept, and called from then on without the compiler.

To import Numba and set it up takes half a second, as long as the merge of gigabytes; to load what it made takes
milliseconds. So the object code of each kernel is kept in the user's cache folder, under a name that changes with
everything it depends on: the source of the loops, Numba and LLVM, the processor, the types of the arguments. What can't be
kept is compiled again by the next process. Code of a few sources and versions is kept, those that were used last. A call holds
no lock, so threads run kernels side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interfuse.progress import say

_LOOPS = Path(__file__).parent / "loops"
#: NumPy's numbers -> how C takes them, and Python's own.
_C: dict[type, Any] = {
    np.float32: ctypes.c_float, np.float64: ctypes.c_double, np.uint8: ctypes.c_uint8, np.uint32: ctypes.c_uint32,
    np.uint64: ctypes.c_uint64, np.int64: ctypes.c_int64, bool: ctypes.c_uint8, int: ctypes.c_int64,
}  # fmt: skip
#: What a loop would call to make an array; it would have no memory to make it in.
_ALLOCATES = ("NRT_Allocate", "NRT_MemInfo_alloc", "NRT_MemInfo_new")
#: How many sources, versions and processors code is kept of: what goes beyond is that of old installations.
_MOST = 8
_FOLDER = re.compile(r"[0-9a-f]{16}")
_lock = threading.Lock()
_said: list[bool] = []  # that loops are compiled


class Code(NamedTuple):
    """A compiled kernel: the name of its function, its object code, and the symbols that only Numba's own callers need."""

    symbol: str
    code: bytes
    unused: tuple[str, ...]


class Kernel:
    """A function of `interfuse.engine.loops`, called by its machine code. A class, because it keeps what it has loaded.

    Arguments are contiguous arrays, numbers, and named tuples of these; the result is an integer.
    """

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name
        self._loaded: dict[tuple[Any, ...], Callable[..., int]] = {}

    def __call__(self, *arguments: Any) -> int:
        kinds: list[Any] = []
        values: list[Any] = []
        for argument in arguments:
            _flatten(argument, kinds, values)
        key = tuple(kinds)
        function = self._loaded.get(key)
        if function is None:
            with _lock:
                function = self._loaded[key] = self._loaded.get(key) or self._load(kinds, arguments)
        result, raised = ctypes.c_int64(0), ctypes.c_void_p(None)
        if function(ctypes.byref(result), ctypes.byref(raised), *values):
            raise RuntimeError(f"{self.module}.{self.name} failed")  # loops raise nothing
        return result.value

    def _load(self, kinds: list[Any], arguments: tuple[Any, ...]) -> Callable[..., int]:
        """The function for arguments of these kinds."""
        content = repr([self.module, self.name, [str(kind) for kind in kinds]])
        name = f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        code = _kept(name)
        if code is None:
            code = self._compile(arguments)
            _keep(name, code)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *_leaves(kinds))
        return prototype(_address(code))

    def _compile(self, arguments: tuple[Any, ...]) -> Code:
        """What Numba makes of the loop for these arguments."""
        import numba

        if not _said:
            _said.append(True)
            say("compiling loops for this processor, which takes some seconds, once")
        loop = getattr(importlib.import_module(f"interfuse.engine.loops.{self.module}"), self.name)
        signature = tuple(numba.typeof(argument) for argument in arguments)
        loop.compile(signature)
        made = loop.overloads[signature]
        _, _, (code, _) = made.library.serialize_using_object_code()
        declared = re.findall(r'^declare [^@]*@"?([^"(]+)"?\(', made.library.get_llvm_str(), re.MULTILINE)
        process = ctypes.CDLL(None)
        unused = [name for name in declared if not name.startswith("llvm.") and not hasattr(process, name)]
        assert not any(name.startswith(_ALLOCATES) for name in unused), f"{self.name} makes an array"
        return Code(made.fndesc.llvm_func_name, code, tuple(unused))


def _flatten(argument: Any, kinds: list[Any], values: list[Any]) -> None:
    """An argument's parts as Numba passes them: an array is an owner and a parent (none), sizes, data, shape and strides."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        kinds.append((argument.dtype.char, argument.ndim))
        data = argument.__array_interface__["data"][0]
        values += [0, 0, argument.size, argument.itemsize, data, *argument.shape, *argument.strides]
    elif isinstance(argument, tuple):
        kinds.append(type(argument).__name__)
        for part in argument:
            _flatten(part, kinds, values)
    else:
        kinds.append(type(argument))
        values.append(argument if isinstance(argument, (int, float)) else argument.item())


def _leaves(kinds: list[Any]) -> list[Any]:
    """The C types of the values."""
    found: list[Any] = []
    for kind in kinds:
        if isinstance(kind, tuple):
            found += [ctypes.c_int64] * (5 + 2 * kind[1])
        elif not isinstance(kind, str):
            found.append(_C[kind])
    return found


@cache
def _folders() -> list[Path]:
    """Where code is kept that was compiled from this source by these versions for this processor: the first that can be."""
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    for path in sorted((*_LOOPS.glob("*.py"), _LOOPS.parent / "kernels.py")):
        digest.update(path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    digest.update(repr([versions, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [place / digest.hexdigest()[:16] for place in (home / "interfuse" / "kernels", _LOOPS / "__pycache__")]


def _kept(name: str) -> Code | None:
    """The code that was kept, if it is whole."""
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, KeyError):
            head, _, code = (folder / name).read_bytes().partition(b"\n")
            found = json.loads(head)
            if hashlib.sha256(code).hexdigest() == found["sha256"]:
                _used(folder)
                return Code(found["symbol"], code, tuple(found["unused"]))
    return None


def _keep(name: str, code: Code) -> None:
    """Keep it for the next process, where that is allowed."""
    head = {"symbol": code.symbol, "unused": code.unused, "sha256": hashlib.sha256(code.code).hexdigest()}
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{name}.{secrets.token_hex(8)}"
            part.write_bytes(json.dumps(head).encode() + b"\n" + code.code)
            os.replace(part, folder / name)
            _used(folder)
            return


@cache
def _used(folder: Path) -> None:
    """Note, once a process, that a folder of code is in use, and remove those beside it that were used longest ago.

    Any process may do so at any time: code that is loaded needs no file, and what is missing is compiled again.
    """
    with contextlib.suppress(OSError):
        os.utime(folder)
        others = [item for item in folder.parent.iterdir() if _FOLDER.fullmatch(item.name) and item != folder]
        when = {item: item.stat().st_mtime_ns for item in others}
        for item in sorted(others, key=lambda item: -when[item])[_MOST - 1 :]:
            shutil.rmtree(item, ignore_errors=True)


@cache
def _machine() -> Any:
    """What runs object code; a symbol that no kernel calls is made to end the process."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine()


_engines: list[Any] = []  # they own the code that runs


def _address(code: Code) -> int:
    """Where the kernel's function is, once its code is in memory."""
    import llvmlite.binding as llvm

    machine = _machine()
    stop = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for name in code.unused:
        if not llvm.address_of_symbol(name):
            llvm.add_symbol(name, stop)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code.code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(code.symbol))
