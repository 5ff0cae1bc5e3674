"""Measured choices drawn at random: every axis and value that a tuning file may hold, for one problem."""

import random

from cupy_msda.call import ALL, Problem, Wanted
from cupy_msda.cuda.tuning import tuned
from cupy_msda.cuda.tuning.tuned import AXES, ORDERED, Choices, Entry


def axes_of(pick, name, *, in_order=False):
    """Some axes of a subject with any of their values."""
    allowed = [axis for axis in AXES[name] if not (in_order and axis in ORDERED.get(name, ()))]
    return {axis: pick.choice(list(AXES[name][axis])) for axis in allowed if pick.random() < 0.8}


def choices_of(pick, problem, wanted):
    """An entry for every subject of the problem."""
    entries = []
    for name in AXES:
        in_order = problem.deterministic and name in ORDERED
        for of in (wanted, wanted._replace(value=False), Wanted(True, False, False, False)):
            subject = tuned.subject_of(name, problem, of)
            entries.append(Entry(subject, tuned.measured_of(problem), axes_of(pick, name, in_order=in_order), 2.0, 1.0))
    return Choices(entries)


def some_entries():
    """Entries of one problem, the same every time."""
    problem = Problem(2, 750, 8, 32, 2, 4, 750, "float32", "float32", ("cuda", 0), None)
    return list({(e.subject, e.sizes): e for e in choices_of(random.Random(0), problem, ALL).entries}.values())
