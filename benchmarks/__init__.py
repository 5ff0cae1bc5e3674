import sys

if sys.argv[:1] == ["-m"]:  # `python -m benchmarks.NAME`
    from benchmarks import missing

    missing.install()
