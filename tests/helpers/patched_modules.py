"""Modules of models for the tests of patches: what is put into them, how it is called, and its line of a report."""

import sys
from types import ModuleType

from tests.helpers.model_functions import SHAPES, by_level, samples

NAME = "some_detector"


def module(monkeypatch):
    """For ``pytest.fixture``: a module of a model."""
    made = ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, made)
    return made


def put(module, part):
    """Make `part` one of the module."""
    part.__module__ = NAME
    setattr(module, part.__name__, part)
    return part


def line(patch, name=NAME):
    """The line of a report on what is in the module."""
    return next(line for line in patch.report() if line.name.startswith(name))


def call(layer):
    value, locations, weights, _ = samples()
    return layer(value, SHAPES, by_level(locations), by_level(weights))
