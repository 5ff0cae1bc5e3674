import sys

if sys.argv[:1] == ["-m"]:  # `python -m tests.NAME`
    from benchmarks import missing

    missing.install()
