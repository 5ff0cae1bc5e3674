"""python -m tests.served_models: models of the packages that are installed, served and compared, as JSON.

For each package of `tests.served_models.models.PACKAGES`, in an environment of its own:

    python -m venv /tmp/models && /tmp/models/bin/pip install . torch==2.13.0 pytest PACKAGE
    /tmp/models/bin/python -m tests.served_models --packages PACKAGE --out benchmarks/results/served_models.json

Rows of packages that are not run stay as they are.
"""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

import torch

from benchmarks.provenance import provenance

from .agreement import compare, prepared
from .models import LINES, PACKAGES, models_of

TOLERANCE = 1e-9


def row_of(model):
    """What the table says of a model."""
    torch.manual_seed(0)
    made, call = model.make()
    agreement = compare(prepared(made), call, model.patch)
    where = provenance("cpu")
    row = {"package": model.package, "version": model.version, "model": model.name, "line": LINES[model.package]}
    row |= {name: where[name] for name in ("date", "commit")}
    if agreement.calls != model.calls:
        raise SystemExit(f"{model.name}: expected {model.calls} calls of the operator, got {agreement.calls}")
    return row | dataclasses.asdict(agreement)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.served_models", description=__doc__)
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--out", type=Path, help="a JSON file, whose rows of these packages are replaced")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    rows = [row_of(model) for package in options.packages for model in models_of(package)]
    for row in rows:
        print(row, flush=True)
    if options.out:
        kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        found = {row["package"] for row in rows}
        kept = [row for row in kept if row["package"] not in found]
        content = {"provenance": provenance("cpu"), "rows": sorted(kept + rows, key=lambda row: row["package"])}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    failed = [row for row in rows if not (row["outputs"] < TOLERANCE > row["gradients"])]
    for row in failed:
        print(f"FAILED: {row}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
