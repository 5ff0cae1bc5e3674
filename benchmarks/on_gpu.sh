#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: all GPU tests ($SANITIZER names tools of compute-sanitizer that repeat them), then
# every benchmark: the implementations, the backward by its options, the host overhead, the training of a small detector,
# whole models of transformers, the fused operator, and the JAX operator. Writes a JSON record of each to a folder.
# usage: [SANITIZER="memcheck racecheck"] benchmarks/on_gpu.sh FOLDER [arguments of benchmarks.run]
set -u
out=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh FOLDER [arguments of benchmarks.run]}")
shift
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
failed=0
# shellcheck disable=SC2086
python3 -m tests.gpu --out "$out" --sanitizer ${SANITIZER:-} || failed=1
python3 -m benchmarks.run --device cuda --out "$out/benchmark.json" "$@" || failed=1
python3 -m benchmarks.backward --out "$out/backward.json" || failed=1
python3 -m benchmarks.overhead --out "$out/overhead.json" || failed=1
python3 -m benchmarks.detector --device cuda --out "$out/detector.json" || failed=1
python3 -m benchmarks.models --modes eager gradients --out "$out" || failed=1
python3 -m benchmarks.fused --out "$out/fused.json" || failed=1
python3 -m benchmarks.jax --out "$out/jax.json" || failed=1
exit $failed
