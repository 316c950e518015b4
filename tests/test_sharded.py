# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Data on several devices give the numbers of one device: engines, values, fits and views."""

from pathlib import Path

import pytest
from conftest import long, on_devices
from test_bad_input import CATALOGUE

SCRIPT = Path(__file__).parent / "sharded_cases.py"
# A mesh of Explicit axes ends in the same program as one of Auto axes.
KINDS = ["plain", "auto", "explicit", "context"]
# Chains in parallel are on a mesh of NumPyro's own, which it cannot make within another one.
REFUSED = {("fit_of_parallel_chains", "context"), ("parallel_chains", "context")}


@pytest.mark.both
@pytest.mark.parametrize(
    ("group", "least"), [("few", 2), long("engines", 30), long("values_and_fits", 15)]
)
def test_several_devices_give_the_numbers_of_one(group, least):
    lines = on_devices(SCRIPT, group, 4)
    names = list(dict.fromkeys(name for name, _, _ in lines))
    kinds = [kind for kind in KINDS if group != "few" or kind != "auto"]
    assert [(name, kind) for name, kind, _ in lines] == [(n, k) for n in names for k in kinds]
    assert len(names) >= least
    wrong = [
        (name, kind, found)
        for name, kind, found in lines
        if (name, kind) not in REFUSED and not (isinstance(found, float) and found <= 1)
    ]
    assert wrong == []


@pytest.mark.both
@pytest.mark.parametrize("kind", ["explicit", long("auto"), long("context")])
def test_bad_input_on_several_devices_is_told_as_on_one(kind):
    lines = on_devices(SCRIPT.with_name("sharded_bad_input.py"), kind, 4)
    assert [name for name, _ in lines] == list(CATALOGUE)
    assert [(name, came) for name, came in lines if came is not None] == []
