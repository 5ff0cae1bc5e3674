#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests (and compute-sanitizer's tools, where $SANITIZER names some), then the
# benchmark, the ways of the backward, the cost of the torch operator on the host, the training of a small detector,
# models of transformers from end to end, and the front end in the kernel beside torch's arithmetic.
# Writes checks.json, benchmark.json, backward.json, overhead.json, detector.json, models_*.json and front_end.json to a
# folder.
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
python3 -m benchmarks.backward --out "$out/backward.json"
backward=$?
python3 -m benchmarks.overhead --out "$out/overhead.json"
overhead=$?
python3 -m benchmarks.detector --device cuda --out "$out/detector.json"
detector=$?
python3 -m benchmarks.models --modes eager gradients --out "$out"
models=$?
python3 -m benchmarks.front_end --out "$out/front_end.json"
front=$?
[ "$checks$bench$backward$overhead$detector$models$front" = 0000000 ]
