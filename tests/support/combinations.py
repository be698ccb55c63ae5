"""Share a check's combinations of parameters among the jobs that run it.

Jobs differ in the number of ranks and in the controller, and running every combination in each of them takes
more time than it is worth. A job with the share ``"0/2"`` runs half of them, and the one with ``"1/2"`` the
others, so that each is run, and every job has every value of every parameter. A check with one parameter is
run whole, and so is one with the mark ``every_combination``.
"""

from __future__ import annotations

import itertools
import os


def keep_share(items):
    """Leave out the items, in place, that are not of the share that ``TEST_SHARE`` names, if it does."""
    if "TEST_SHARE" not in os.environ:
        return
    number, shares = map(int, os.environ["TEST_SHARE"].split("/"))
    kept = []
    for _, group in itertools.groupby(list(items), lambda item: (item.path, item.originalname)):
        group = list(group)
        values = zip(*map(_values, group), strict=True)  # of each parameter
        varying = [numbered for one in values if max(numbered := _numbered(one)) > 0]
        if len(varying) < 2 or group[0].get_closest_marker("every_combination"):
            kept += group
        else:
            diagonals = map(sum, zip(*varying, strict=True))
            kept += [item for item, one in zip(group, diagonals, strict=True) if one % shares == number]
    items[:] = kept


def _values(item):
    """What an item has of each ``parametrize``, as text."""
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    names = [[mark] if isinstance(mark, str) else mark for mark in marks]
    return [str([item.callspec.params[name] for name in some]) for some in names]


def _numbered(values):
    """Numbers in place of values, from 0, by their first places."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [numbers[value] for value in values]
