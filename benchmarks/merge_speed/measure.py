"""Runs a whole process and measures it: seconds, and the memory that it and its children hold, sampled every 20 ms.

Own memory is what is anonymous (`RssAnon`): the process's and nobody else's. Resident memory (`VmRSS`) also counts mapped
files, which any process may have from the page cache. Linux only.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.02  # seconds between two samples


@dataclass(frozen=True)
class Measured:
    """One run: seconds on the wall, the peaks of own and resident memory in MB (0 where not sampled), standard output."""

    seconds: float
    own: float = 0.0
    resident: float = 0.0
    said: str = ""
    others: float = 0.0  # CPU seconds that other processes used meanwhile: a quiet machine has almost none


class Failed(Exception):
    """A process that didn't end with 0; the message is the end of what it said."""


def run(command: Sequence[str | Path], *, memory: bool = False) -> Measured:
    """Run the command to its end; with `memory`, sample it on the way, which costs it a little time.

    As an installed package is run: with its modules compiled once, whatever this environment says.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    busy, began = _others(), time.perf_counter()
    pipe = subprocess.PIPE
    process = subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True, env=environment)
    own = resident = 0.0
    if memory:
        while process.poll() is None:
            sample = [_memory(pid) for pid in _family(process.pid)]
            own = max(own, sum(pair[0] for pair in sample))
            resident = max(resident, sum(pair[1] for pair in sample))
            time.sleep(EVERY)
    said, wrong = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise Failed("\n".join(wrong.strip().splitlines()[-8:]) or f"exit status {process.returncode}")
    return Measured(seconds, own, resident, said, _others() - busy)


def read_all(files: Iterable[Path]) -> None:
    """Read the files once, so that a timed run finds them in memory: machines like these evict idle page cache."""
    buffer = bytearray(1 << 24)
    for path in files:
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def hold_memory(room: int) -> mmap.mmap:
    """All free memory but `room` bytes, for as long as the result lives: runs then use the same few pages again and again.

    The host of a virtual machine takes free memory back within seconds, and whoever touches it next waits for the host: the
    floor then took one second or nine. Anonymous memory, of this process; it's touched once.
    """
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree"))
    size = max(int(free.split()[1]) * 1024 - room, mmap.PAGESIZE)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def compile_floor(folder: Path) -> Path | None:
    """`floor.c` compiled for this machine, or None, with a message, where there's no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("no C compiler (cc, gcc, clang) was found: the floor isn't measured")
        return None
    out = folder / "floor"
    source = Path(__file__).with_name("floor.c")
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", str(source), "-o", str(out)], check=True)
    return out


def floor_command(program: Path, models: Sequence[Path], out: Path, threads: int, *, sync: bool = False) -> list[str]:
    """The floor's command line, for models whose shards are laid out alike."""
    shards = [sorted(folder.glob("*.safetensors")) for folder in models]
    files = [str(file) for shard in zip(*shards, strict=True) for file in shard]
    return [str(program), str(threads), str(int(sync)), str(out), str(len(models)), *files]


def _others() -> float:
    """CPU seconds of the machine so far, without those of this process and the children that it has waited for."""
    ticks = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, and waiting for a disk
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _family(pid: int) -> list[int]:
    """The process and all that it started."""
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:  # it has ended
            pass
    return found


def _memory(pid: int) -> tuple[float, float]:
    """Own and resident memory, in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    # A process that has ended, and isn't waited for yet, has no memory and no such lines.
    return tuple(int(values.get(name, "0 kB").split()[0]) * 1024 / 1e6 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
