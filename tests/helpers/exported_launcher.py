"""The exported C sources, compiled with a stub of libcuda into a library whose launches come back to Python."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cupy_msda.cuda import c_sources

COMPILER = shutil.which("cc") or shutil.which("gcc")
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
STUB, PROGRAM = (Path(__file__).parent / name for name in ("stub_libcuda.c", "exported_program.c"))
# 64-bit words of the kernel's parameters.
WORDS = (1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)


class Launch(NamedTuple):
    """What ``cuLaunchKernel`` got."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int
    words: tuple[int, ...]


class Kernel(ctypes.Structure):
    """``cupy_msda_kernel``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("configuration", "cubin", "module", "function")] + [
        ("wave", ctypes.c_int64)
    ]


class Arguments(ctypes.Structure):
    """``cupy_msda_arguments``."""

    ADDRESSES = (
        "value", "spatial_shapes", "level_start_index", "locations", "weights", "references", "query_lengths", "output",
    )  # fmt: skip
    _fields_ = [(name, ctypes.c_void_p) for name in ADDRESSES] + [(name, ctypes.c_int64) for name in "NSQ"]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def compile_objects(folder):
    """An object file of each exported source in `folder`, without warnings."""
    for source in sorted(folder.glob("cupy_msda_*.c")):
        command = [COMPILER, *STRICT, "-fPIC", "-c", source.name, "-o", f"{source.stem}.o"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return sorted(folder.glob("cupy_msda_*.o"))


def compile_program(folder, configuration, libcuda):
    """``exported_program.c`` with the sources in `folder`, for one configuration, linked with nothing but `libcuda`."""
    program = folder / f"run_{configuration}"
    command = [
        COMPILER, *STRICT, f"-DCONFIGURATION={configuration}", f"-I{folder}", PROGRAM, *sorted(folder.glob("cupy_*.c")),
        libcuda, "-o", program,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def libcuda():
    """The file of the driver's library, which no folder of the linker may have."""
    ctypes.CDLL("libcuda.so.1")
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return next(path for path in mapped if Path(path).name.startswith("libcuda.so"))


def run_program(program, folder, arrays, sizes, like):
    """The output of the program, as an array like `like`, for `arrays` by their names in ``cupy_msda_arguments``."""
    for name, array in arrays.items():
        (folder / f"{name}.bin").write_bytes(array.tobytes())
    done = subprocess.run(
        [program, folder, *map(str, sizes), str(like.nbytes)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return np.frombuffer((folder / "output.bin").read_bytes(), like.dtype).reshape(like.shape)


class Launcher:
    """The launcher with the kernels of `exports`, on a device that the stub describes. Each launch calls `run`."""

    def __init__(self, exports, folder, gpu, run=lambda launch: None):
        c_sources.write(exports, folder)
        command = [COMPILER, "-shared", "-fPIC", "-o", "exported.so", *compile_objects(folder), STUB]
        subprocess.run(command, cwd=folder, check=True)
        self.library = ctypes.CDLL(str(folder / "exported.so"))
        self.launches, self.run = [], run
        self._callback = _Callback(self._launched)
        ctypes.c_void_p.in_dll(self.library, "stub_launch").value = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.set("major", gpu.architecture // 10)
        self.set("minor", gpu.architecture % 10)
        self.set("multiprocessors", gpu.multiprocessors)

    def set(self, name, value):
        """A variable of the stub."""
        self.get(name).value = value

    def get(self, name):
        return ctypes.c_int.in_dll(self.library, f"stub_{name}")

    @property
    def attributes(self):
        """Those that the kernel has by their numbers."""
        return list((ctypes.c_int * 16).in_dll(self.library, "stub_attributes"))

    def load(self, export, expected=0):
        kernel = Kernel()
        configuration = ctypes.c_byte.in_dll(self.library, f"cupy_msda_{export.name}")
        assert self.library.cupy_msda_load(ctypes.byref(kernel), ctypes.byref(configuration)) == expected
        return kernel

    def forward(self, kernel, stream=None, **arguments):
        """The status of a call."""
        return self.library.cupy_msda_forward(
            ctypes.byref(kernel), ctypes.byref(Arguments(**arguments)), ctypes.c_void_p(stream)
        )

    def _launched(self, grid, threads, shared_bytes, stream, parameters):
        words = []
        for number, count in enumerate(WORDS):
            words += (ctypes.c_int64 * count).from_address(parameters[number])
        launch = Launch((grid[0], grid[1], grid[2]), threads, shared_bytes, stream or 0, tuple(words))
        self.launches.append(launch)
        self.run(launch)
        return 0
