#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the GPU tests, then the benchmark. Writes tests.txt and benchmark.json to $1.
# usage: benchmarks/on_gpu.sh FOLDER [arguments of benchmarks.run]
set -u
out=${1:?usage: benchmarks/on_gpu.sh FOLDER [arguments of benchmarks.run]}
shift
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
mkdir -p "$out"
python3 -m pytest -q -p no:cacheprovider tests/test_operator.py tests/test_gpu.py 2>&1 | tee "$out/tests.txt"
tests=${PIPESTATUS[0]}
python3 -m benchmarks.run --device cuda --out "$out/benchmark.json" "$@"
bench=$?
[ "$tests" -eq 0 ] && [ "$bench" -eq 0 ]
