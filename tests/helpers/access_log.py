"""The access log of the emulator, which finds data races: how it is built, and what its reports mean."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

from cupy_msda.cuda import kernels

HERE = Path(__file__).parent
SOURCE = HERE / "access_log.cpp"
# Among the flags, because an emulated kernel is cached by its flags and text: another log needs another build.
VERSION = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
#: To compile a kernel so that it calls the log. Its addresses are then those of its file.
FLAGS = ("-c", "-g1", "-fno-pie", "-fsanitize=thread", f"-DACCESS_LOG=0x{VERSION}")


def link(compiler, kernel, folder):
    """Make the object file `kernel` an executable: with the log, not with the library of the sanitizer."""
    log = folder / f"access_log_{VERSION}.o"
    if not log.exists():
        temporary = log.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-std=c++17", "-O2", "-fno-pie", "-c", SOURCE, "-o", temporary], check=True)
        temporary.rename(log)
    linked = kernel.with_suffix(f"{kernel.suffix}.linked")
    subprocess.run([compiler, "-no-pie", kernel, log, "-o", linked], check=True)
    linked.rename(kernel)


class Log:
    """A log of launches: which barriers and fences they have reached, as (kernel, line of its source)."""

    def __init__(self):
        self.reached = set()

    def add_reached(self, spec, printed):
        before = 1 + kernels.prelude(spec).count("\n")
        self.reached |= {(spec.kernel, int(line) - before) for line in printed.split()}


def explained(message, target, names, body):
    """A report with the names of arrays, and with lines of `body`, which the program has from 2 on, for addresses."""
    message = re.sub(r"array (\d+)", lambda found: names[int(found[1])], message)
    lines = ["", "", *body.splitlines()]
    return re.sub(r"code (0x[0-9a-f]+)", lambda found: _line(target, int(found[1], 16), lines), message)


def _line(target, address, lines):
    """The line of the source, not of the emulator's functions in it. `address` is that of the next code."""
    command = ["addr2line", "-i", "-e", str(target), hex(address - 1)]
    places = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"stdin>:(\d+)", places)
    return f'line {found[1]} "{lines[int(found[1])].strip()}"' if found else places
