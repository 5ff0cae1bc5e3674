"""Fewer cases by default: the others are among the longer proofs."""

import pytest


def every_other(parameters):
    """The first, the third and so on run by default, all of them with ``-m long``."""
    return [pytest.param(one, marks=pytest.mark.long if number % 2 else ()) for number, one in enumerate(parameters)]
