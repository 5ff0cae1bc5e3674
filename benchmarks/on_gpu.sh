#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests (and compute-sanitizer's tools, where $SANITIZER names some), then the
# benchmark. Writes checks.json and benchmark.json to a folder.
# usage: [SANITIZER="memcheck racecheck"] benchmarks/on_gpu.sh FOLDER [arguments of benchmarks.run]
set -u
out=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh FOLDER [arguments of benchmarks.run]}")
shift
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
# shellcheck disable=SC2086
python3 -m benchmarks.checks --out "$out" --sanitizer ${SANITIZER:-}
checks=$?
python3 -m benchmarks.run --device cuda --out "$out/benchmark.json" "$@"
bench=$?
[ "$checks" -eq 0 ] && [ "$bench" -eq 0 ]
