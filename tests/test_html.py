# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What notebooks show of results and reports: the words and numbers of the text, escaped."""

import html
import re

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_regloss import Gaussian, Loss, TwoStep, diagnostics, fit, shift, values
from numpyro_regloss._core.html import as_html
from numpyro_regloss.diagnostics.arrival import Finding

pytestmark = pytest.mark.both
NAME = "a<b>&"


@pytest.fixture(scope="module")
def run():
    loss = Loss.from_function(lambda p: jnp.sum(p[NAME] ** 2), {NAME: jnp.ones(2)})
    optimizer = TwoStep(loss, 0.5, shift=shift.Importance(200), fit=fit.ForwardKL())
    return optimizer, optimizer.run(random.key(0), 3, progress_bar=False)


def words(shown):
    """Of the HTML, without tags; what was not escaped would be gone or left over."""
    assert isinstance(shown, str)
    # No color, no script: tables and paragraphs alone.
    assert set(re.findall(r"<(/?\w+[^>]*)>", shown)) <= {
        f"{slash}{tag}"
        for tag in ("table", "thead", "tbody", "tr", "th", "td", "p")
        for slash in ("", "/")
    }
    return html.unescape(re.sub(r"<[^>]*>", " ", shown)).split()


def test_reports_show_what_they_print(run):
    optimizer, result = run
    draws = optimizer.draw(random.key(0), result.state)
    report = diagnostics.summary(result, draws=draws)
    report = report._replace(findings=(Finding("x", f"at {NAME} something"),))
    wide = Gaussian.isotropic(result.state.reference.mean, 9.0)
    fitted = diagnostics.gaussian_fit(draws.x, wide)
    profile = values.profile(
        random.key(0), optimizer.loss, taus=[0.1, 1.0], num_samples=50, method="importance"
    )
    unsure = profile._replace(heat=profile.heat._replace(error=jnp.array([0.1, jnp.inf])))
    verdict = values.FlatnessVerdict(
        "pays", 1.0, 0.1, profile.heat._replace(value=1.0, error=0.1), 1.0, 2.0
    )
    for shown in (report, report.draws, fitted, profile, unsure, verdict):
        assert words(shown._repr_html_()) == str(shown).split()
    heads = (report, report.table().splitlines()[0]), (profile, str(profile).splitlines()[1])
    for table, head in heads:
        # Columns are two spaces apart; the one for marks has no name.
        names = [name for name in re.findall(r"<th>(.*?)</th>", table._repr_html_()) if name]
        assert names == re.split(r"\s{2,}", head.strip())
    assert "at a&lt;b&gt;&amp; something" in report._repr_html_()
    assert "do not trust heat" in unsure._repr_html_()


def test_result_shows_the_run(run):
    _, result = run
    shown = result._repr_html_()
    assert "<td>a&lt;b&gt;&amp;</td><td>(2,)</td>" in shown
    seen = words(shown)
    assert seen[:6] == ["3", "of", "3", "steps", "taken,"] + [f"{np.sum(result.seconds):.1f}"]
    assert {f"{result.history.loss[0]:.4g}", f"{result.history.loss[2]:.4g}", "0.5"} <= set(seen)
    stopped = result._replace(stopped="arrived", seconds=None)._repr_html_()
    assert "<p>3 of 3 steps taken, stopped: arrived.</p>" in stopped
    keys = result._replace(params={"key": random.key(0), "x": 1.0})._repr_html_()
    assert "<td>key</td><td>()</td><td></td>" in keys
    assert "<td>x</td><td>()</td><td>1.</td>" in keys
    many = result._replace(params=[jnp.zeros(11)] * 25)._repr_html_()
    assert "5 more arrays of parameters" in many
    assert many.count("<td>(11,)</td><td></td>") == 20
    none = result._replace(history=result.history._replace(ok=np.ones((2, 3), bool)))
    assert "history.ok has shape (2, 3)" in none._repr_html_()


def test_html_is_escaped():
    assert as_html("<a>\n\n&", [["<"], ['"']]) == (
        "<p>&lt;a&gt;</p>\n<p>&amp;</p>\n<table>\n<thead><tr><th>&lt;</th></tr></thead>\n<tbody>\n"
        "<tr><td>&quot;</td></tr>\n</tbody>\n</table>"
    )


def test_notebooks_call_it(run):
    formatters = pytest.importorskip("IPython.core.formatters")
    report = diagnostics.summary(run[1])
    assert formatters.HTMLFormatter()(report) == report._repr_html_()
