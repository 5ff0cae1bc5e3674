"""Drawn cells on the CPU: what is measured, what counts as slower, and the table of the records."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cells_report, cpu_grid

CELL = cpu_grid.Cell(((4, 4),), 1, 3, 2, 4, 2, "float32", False, "weights")


@pytest.mark.parametrize("fused", [False, True])
def test_a_cell_has_the_times_of_all_directions(monkeypatch, fused):
    monkeypatch.setattr(cpu_grid, "LEAST_SECONDS", 0)
    monkeypatch.setattr(cpu_grid, "UNTIMED_SECONDS", 0)
    row = cpu_grid.measure(replace(CELL, fused=fused))
    assert row["valid"]
    for name in ("ours", "grid_sample"):
        assert all(row[f"{name} {direction}"] > 0 for direction in ("forward", "backward", "training"))
    assert set(cpu_grid.summary([row])["grid_sample"]) == {"forward", "backward", "training"}


@pytest.mark.parametrize(("direction", "margin_us"), [("forward", 100), ("backward", 300), ("training", 400)])
def test_a_short_call_is_slower_beyond_its_margin_and_a_long_one_beyond_a_tenth(direction, margin_us):
    pairs = [(20, 19 + margin_us), (20, 21 + margin_us), (20_000, 21_900), (20_000, 22_100)]
    rows = [{f"ours {direction}": ours * 1e-6, f"peer {direction}": peer * 1e-6} for peer, ours in pairs]
    assert cpu_grid.compared(rows, "peer", direction)["slower"] == 2


def test_the_table_reads_records_without_training():
    numbers = {"geometric_mean": 2, "slower": 3, "cells": 10}
    both = {"forward": numbers, "backward": numbers}
    provenance = {
        "packages": {},
        "date": "2026-12-01",
        "device": "a CPU",
        "commit": "0" * 40,
        "threads": 2,
        "cpu": "a CPU",
    }
    results = [
        (Path("old.json"), {"tier": "numba", "summary": {"peer": both}, "provenance": provenance}),
        (
            Path("new.json"),
            {"tier": "NumPy", "summary": {"peer": both | {"training": numbers}}, "provenance": provenance},
        ),
    ]
    _, _, old, new = cells_report.cpu_cells_table(results).splitlines()[:4]
    assert old == "| numba, `peer` | 2.00x | 3 of 10 | 2.00x | 3 of 10 |  |  |"
    assert new == "| NumPy, `peer` | 2.00x | 3 of 10 | 2.00x | 3 of 10 | 2.00x | 3 of 10 |"
