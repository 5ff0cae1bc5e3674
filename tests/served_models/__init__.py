"""Whole models of other packages, served by one line and compared with themselves: `python -m tests.served_models`."""
