"""python -m benchmarks.startup: seconds of the first call of a kernel, compiled and from CuPy's disk cache.

Each measurement has its own process. The CUDA context and CuPy's own kernels are ready before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .provenance import provenance

PROGRAM = """
import time, cupy, cupy_msda
cupy.zeros(1).sum().get()
cupy.RawModule(code='extern "C" __global__ void warm() {}').get_function("warm")((1,), (1,), ())
value = cupy.zeros((1, 6, 8, 32), "float32")
locations, weights = cupy.zeros((1, 9, 8, 1, 4, 2), "float32"), cupy.zeros((1, 9, 8, 1, 4), "float32")
cupy.cuda.Device().synchronize()
for call in (lambda: cupy_msda.ms_deform_attn(value, [(2, 3)], None, locations, weights),
             lambda: cupy_msda.ms_deform_attn_backward(value, [(2, 3)], None, locations, weights,
                                                       cupy.zeros((1, 9, 256), "float32"), 64)):
    begin = time.perf_counter()
    call()
    cupy.cuda.Device().synchronize()
    print(time.perf_counter() - begin)
"""


def first_call_seconds(cache: str) -> dict[str, float]:
    """Seconds of the first forward and backward of a process with `cache` as its kernel cache."""
    environment = os.environ | {"CUPY_CACHE_DIR": cache}
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return {"forward_s": float(output[0]), "backward_s": float(output[1])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        result = {"provenance": provenance("cuda"), "compiled": first_call_seconds(cache)}
        result["cached"] = first_call_seconds(cache)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("compiled", "cached")}))


if __name__ == "__main__":
    main()
