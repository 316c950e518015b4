# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The house: modules import lower floors only."""

import ast
from pathlib import Path

import pytest

import numpyro_regloss

pytestmark = pytest.mark.both

ROOT = Path(numpyro_regloss.__file__).parent
FLOORS = {
    "_version": 0,
    "_typing": 0,
    "_rounding": -1,
    "_ranks": -1,
    "_environment": -1,
    "_pytree": 0,
    "_captured": 1,
    "_arguments": 1,
    "_optax": 0,
    "_stats": 0,
    "_pareto": 0,
    "_packing": 1,
    "_fence": 0,
    "_tilted": 1,
    "_constrained": 1,
    "_checks": 1,
    "_tail": 1,
    "_pair_values": 2,
    "_estimate": 1,
    "_factorizations": 0,
    "_one_at_a_time": 1,
    "_sites": 1,
    "_model_data": 1,
    "_model_checks": 1,
    "_control_variates": 1,
    "_factor_analysis": 1,
    "_threefry": 1,
    "_warm_up": 1,
    "_chunks": 1,
    "_base_draws": 1,
    "_scrambled_sobol": 1,
    "_batch_means": 1,
    "_quasi_newton": 1,
    "problems.base": 1,
    "problems.quadrature": 2,
    "problems": 3,
    "low_rank_gaussian": 1,
    "gaussian": 2,
    "minibatch": 2,
    "_function_source": 2,
    "_model_source": 2,
    "loss": 3,
    "regularized": 4,
    "draws": 4,
    "_hmc_settings": 2,
    "_sampler_stats": 5,
    "_whitened_hmc": 6,
    "_cloud": 5,
    "_moments": 5,
    "_langevin": 5,
    "_replicas": 4,
    "_descent": 5,
    "_tempering": 5,
    "_tempering_moves": 5,
    "_bridge": 5,
    "_evidence": 6,
    "_samples": 5,
    "_chain_agreement": 5,
    "_families": 6,
    "_probe": 3,
    "_symmetry": 1,
    "_parts": 7,
    "_outer_step": 5,
    "_variational": 5,
    "_improper": 5,
    "_sample_average": 6,
    "_natural_gradient": 6,
    "_guide_fit": 6,
    "_gaussian_guide": 5,
    "_guide_draws": 5,
    "_robbins_monro_error": 5,
    "_robbins_monro_gradient": 5,
    "_guide_moments": 6,
    "_result": 6,
    "_rank_diagnostics": 1,
    "_run_columns": 7,
    "_run_arrival": 8,
    "_run_doubts": 9,
    "_run_probe": 9,
    "_run_findings": 10,
    "_run_summary": 11,
    "shift.base": 6,
    "fit.base": 6,
    "anchor.base": 5,
    "_score_regression": 5,
    "_safeguard": 6,
    "shift": 7,
    "fit": 7,
    "anchor": 7,
    "_values": 8,
    "_profile": 9,
    "_landscape": 9,
    "_gradient": 9,
    "values": 10,
    "plots._style": 9,
    "plots": 11,
    "_arviz_compat": 0,
    "_equal_weights": 0,
    "_site_labels": 5,
    "_per_draw": 5,
    "_draw_datasets": 6,
    "_observation_datasets": 7,
    "_history_dataset": 7,
    "_step_draws": 8,
    "io_arviz": 10,
    "guides": 8,
    "two_step": 8,
    "schedules": 2,
    "schemes": 9,
    "record": 9,
    "diagnostics": 12,
    "": 13,
    "__main__": 14,
}
ENGINES = ("shift", "fit", "anchor")  # one file, one algorithm: none imports another
MODULES = sorted(ROOT.rglob("*.py"))


def floor_of(name):
    parts = name.split(".")
    for known in (".".join(parts[:2]), parts[0]):
        if known in FLOORS:
            return FLOORS[known]
    raise AssertionError(f"{name}: give the new module a floor in this test")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpyro_regloss"):
            base = node.module.removeprefix("numpyro_regloss").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                is_module = (ROOT / (inner.replace(".", "/") + ".py")).exists() or (
                    ROOT / inner
                ).is_dir()
                yield inner if is_module else base


def lines_of_code(text):
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(
        bool(line) and not line.startswith("#") and number not in docstrings
        for number, line in lines
    )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_lower_floors_only(path):
    name = module_name(path)
    package = name.split(".")[0]
    for imported in imports(path):
        if path.name == "__init__.py" and imported.split(".")[0] == package:
            continue
        same_folder = imported.split(".")[0] == package and "." in imported
        if same_folder and package in ENGINES:
            assert imported.endswith(".base"), f"{name} imports sideways: {imported}"
        assert floor_of(imported) < floor_of(name), f"{name} imports {imported}, on no lower floor"


def test_no_module_is_too_long():
    # A file above 400 lines of code, docstrings left out, wants a reason; none has one.
    long = {module_name(p): lines_of_code(p.read_text()) for p in MODULES}
    assert [name for name, lines in long.items() if lines > 400] == []
    assert lines_of_code('"""Two\n\nlines."""\n\n# why\nx = [\n    1,\n]\n') == 3


def test_headers():
    for path in [*MODULES, *Path(__file__).parent.glob("*.py")]:
        lines = path.read_text().splitlines()[:2]
        assert lines == [
            "# Copyright Contributors to the numpyro_regloss project.",
            "# SPDX-License-Identifier: Apache-2.0",
        ], path
