# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What figures show: the numbers of the history and the report, on the axes given, whatever became of the run."""

import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from matplotlib import pyplot as plt
from numpyro.infer import HMC, MCMC

from numpyro_regloss import (
    Gaussian,
    Loss,
    Record,
    RegularizedLoss,
    TwoStep,
    fit,
    plots,
    problems,
    schemes,
    shift,
    values,
)
from numpyro_regloss import model as regularized
from numpyro_regloss.losses.sites import unconstrained_labels

pytestmark = pytest.mark.both

mpl.use("Agg")
STEPS = 6
# Grids have tens of points, each with its own comparison, and errors that are themselves estimated from 32 pairs.
SIGMAS = 5.0


def bowl(p):
    return p["a"] ** 2 + 0.5 * jnp.sum(p["b"] ** 2)


@pytest.fixture(scope="module")
def optimizer():
    loss = Loss.from_function(bowl, {"a": 1.0, "b": jnp.array([2.0, -1.0])})
    return TwoStep(
        loss,
        0.5,
        shift=shift.Importance(200),
        fit=fit.ForwardKL("diagonal"),
        record=Record(values_every=2, num_samples=50),
    )


@pytest.fixture(scope="module")
def result(optimizer):
    return optimizer.run(random.key(0), STEPS, progress_bar=False)


@pytest.fixture(scope="module")
def plane():
    loss = Loss.from_function(problems.double_well(2).loss, np.array([1.0, 0.0]))
    return values.landscape(random.key(0), loss, tau=0.1, temperature=0.5, num_points=9)


@pytest.fixture(scope="module")
def line():
    loss = Loss.from_function(bowl, {"a": 0.5, "b": jnp.array([0.2, -0.4])})
    return values.landscape(
        random.key(0), loss, None, {"a": 0.5, "b": jnp.ones(2)}, tau=0.5, num_points=11
    )


@pytest.fixture(autouse=True)
def no_traces():
    """A figure changes no setting of matplotlib, opens one figure at most, and can be drawn."""
    plt.close("all")  # those of other modules' examples
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    assert len(plt.get_fignums()) <= 1
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def labeled(ax):
    return {line.get_label(): line for line in ax.lines}


def test_optimization_shows_the_history(result):
    axes = plots.optimization(result)
    assert axes.shape == (2,)
    history, record = result.history, result.history.record
    curves = labeled(axes[0])
    np.testing.assert_allclose(curves["loss"].get_ydata(), history.loss)
    known = np.arange(0, STEPS, 2)
    for name, estimate in (("local entropy", record.local_entropy), ("heat", record.heat)):
        np.testing.assert_array_equal(curves[name].get_xdata(), known)
        np.testing.assert_allclose(curves[name].get_ydata(), estimate.value[known])
    marks = labeled(axes[1])
    shown = sum(len(line.get_xdata()) for label, line in marks.items() if not label.startswith("_"))
    assert shown == STEPS
    at = record.verdict == 1
    assert at.any()
    np.testing.assert_allclose(marks["decrease"].get_ydata(), record.decrease[at])
    assert all("units of" in ax.get_ylabel().replace("\n", " ") for ax in axes)
    assert axes[1].get_xlabel() == "step"
    plt.close("all")
    # A tau that changes has a panel, also that of one parameter alone.
    tau = 0.5 * 0.9 ** np.arange(STEPS)
    for shown, middle in ((tau, tau), (np.stack([np.full(STEPS, 0.5), tau], 1), (0.5 + tau) / 2)):
        axes = plots.optimization(history._replace(tau=shown))
        assert axes.shape == (3,)
        np.testing.assert_allclose(axes[2].lines[0].get_ydata(), middle)
        assert all("units of" in ax.get_ylabel().replace("\n", " ") for ax in axes)
        assert axes[2].get_xlabel() == "step"
        plt.close("all")
    constant = np.broadcast_to([0.5, 0.1], (STEPS, 2))
    assert plots.optimization(history._replace(tau=constant)).shape == (2,)


def test_optimization_without_a_record_shows_the_length_of_steps(result):
    history = result.history._replace(record=None)
    axes = plots.optimization(result._replace(history=history))
    curves = labeled(axes[1])
    centers = np.concatenate([history.reference.mean, result.state.reference.mean[None]])
    moved = np.linalg.norm(np.diff(centers, axis=0), axis=1)
    np.testing.assert_allclose(curves["step"].get_ydata(), moved, rtol=1e-5)
    noise = np.linalg.norm(history.fit.mean_error, axis=1)
    np.testing.assert_allclose(
        curves["Monte Carlo error of the fitted mean"].get_ydata(), noise, rtol=1e-5
    )
    plt.close("all")
    # Of a history alone the last step is not known.
    assert len(labeled(plots.optimization(history)[1])["step"].get_ydata()) == STEPS - 1


def test_whatever_became_of_a_run_it_can_be_drawn(optimizer, result):
    history = result.history
    ok = np.array([True, False] * 3)
    broken = history._replace(
        ok=ok,
        loss=np.array([np.nan, np.inf, -np.inf, 1e-3, 1e5, 1.0]),
        tau=np.stack([history.tau, 2 * history.tau, np.full(STEPS, np.nan)], 1),
        fit=history.fit._replace(mean_error=np.full((STEPS, 3), np.inf)),
        shift=history.shift._replace(khat=np.array([np.inf, -np.inf, np.nan, 0.2, 0.9, 0.5])),
        record=history.record._replace(
            decrease=np.full(STEPS, np.nan), decrease_error=np.full(STEPS, np.inf)
        ),
    )
    rejected = labeled(plots.optimization(broken)[0])["rejected step"]
    np.testing.assert_array_equal(rejected.get_xdata(), np.flatnonzero(~ok))
    plt.close("all")
    marks = labeled(plots.shift_quality(broken)[1])
    np.testing.assert_array_equal(marks["+∞"].get_xdata(), [0])
    np.testing.assert_array_equal(marks["−∞"].get_xdata(), [1])
    plt.close("all")
    rejected = labeled(plots.trajectory(broken, optimizer)[0])["rejected step"]
    np.testing.assert_array_equal(rejected.get_xdata(), np.flatnonzero(~ok) + 1)


def test_one_step_is_seen(optimizer, result):
    import jax  # noqa: PLC0415

    one = jax.tree.map(lambda a: a[:1], result.history)
    ax = plots.optimization(one)[0]
    assert ax.lines[0].get_marker() == "."
    assert ax.get_xlim() == (-0.5, 0.5)
    plt.close("all")
    result = result._replace(history=one)
    assert len(plots.trajectory(result, optimizer)[0].lines[0].get_xdata()) == 2


def test_shift_quality_shows_what_the_engine_reports(result):
    info = result.history.shift
    axes = plots.shift_quality(result)
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), info.ess)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), info.khat)
    limit = labeled(axes[1])["0.7: above, not to be trusted"]
    np.testing.assert_array_equal(limit.get_ydata(), 0.7)
    plt.close("all")
    # Of rounds, those of the engine within.
    rounds = shift.adaptive.AdaptiveInfo(*[info.ok] * 3, np.arange(STEPS), *[info.ok] * 3, info)
    axes = plots.shift_quality(result.history._replace(shift=rounds))
    assert [ax.get_ylabel() for ax in axes] == ["effective\nsample size", "Pareto k-hat", "rounds"]
    plt.close("all")
    # What the engine that `Auto` chose does not report has no panel.
    fields = dict.fromkeys(shift.auto.AutoInfo._fields, np.full(STEPS, np.nan))
    fields |= {"ess": info.ess, "khat": info.khat}
    axes = plots.shift_quality(result.history._replace(shift=shift.auto.AutoInfo(**fields)))
    assert [ax.get_ylabel() for ax in axes] == ["effective\nsample size", "Pareto k-hat"]


def test_counts_have_panels_if_there_were_some(result):
    few = np.arange(STEPS) // 4
    for count, panels in ((0 * few, 2), (few, 3), (0 * few + 7, 3)):
        info = result.history.shift._replace(num_rejected=count)
        axes = plots.shift_quality(result.history._replace(shift=info))
        assert len(axes) == panels
        if panels == 3:
            plt.gcf().canvas.draw()
            assert axes[2].get_ylabel() == "rejected\nevaluations"
            assert all(tick == round(tick) for tick in axes[2].get_yticks())
        plt.close("all")


def test_titles_are_above_the_legend(optimizer, result):
    given = plt.subplots(figsize=(3, 3), layout="constrained")[1]
    axes = plots.trajectory(result, optimizer, plane=True, axes=given)
    axes[0].set_title("mine")
    figure = axes[0].figure
    figure.canvas.draw()
    legend = axes[0].get_legend().get_window_extent()
    assert axes[0].title.get_window_extent().y0 >= legend.y1 - 1.0
    # In narrow axes it has several rows, and ends where they do.
    assert legend.x1 <= axes[0].get_window_extent().x1 + 1.0
    assert figure.axes == list(axes)
    plt.close("all")
    # Without a layout there is room within the axes alone.
    given = plt.subplots(figsize=(3, 3))[1]
    plots.trajectory(result, optimizer, plane=True, axes=given)
    given.set_title("mine")
    given.figure.canvas.draw()
    assert given.get_legend().get_window_extent().y1 <= given.get_window_extent().y1
    assert given.title.get_window_extent().y1 <= given.figure.bbox.y1


def test_labels_say_what_is_unconstrained(optimizer, result):
    def model():
        numpyro.sample("at", dist.Normal(0, 1))
        numpyro.sample("share", dist.Dirichlet(jnp.ones(2)))
        numpyro.sample("width", dist.HalfNormal(1))

    loss = Loss.from_model(model)
    shown = ("at", "share[0] (unconstrained)", "width (unconstrained)")
    assert loss.flat_names == ("at", "share[0]", "width")
    assert unconstrained_labels(loss) == shown
    assert unconstrained_labels(optimizer.loss) == optimizer.loss.flat_names
    several = schemes.parle(loss, 1.0, num_replicas=2).loss
    wanted = ("at@0", "share[0]@0 (unconstrained)", "width@0 (unconstrained)", "at@1")
    assert unconstrained_labels(several)[:4] == wanted
    assert values.grid._chosen(loss, ["width", 0])[1] == (shown[2], "at")
    # Another loss of three parameters serves as well.
    of_model = TwoStep(loss, 0.5, shift=shift.Importance(200), fit=fit.ForwardKL())
    axes = plots.trajectory(result, of_model, ["width", "at"])
    assert [ax.get_ylabel() for ax in axes] == ["width\n(unconstrained)", "at"]
    plt.close("all")
    mcmc = MCMC(
        HMC(regularized, trajectory_length=0.1), num_warmup=2, num_samples=20, progress_bar=False
    )
    fitted = Gaussian.isotropic(jnp.zeros(3), 0.1)
    mcmc.run(random.key(0), RegularizedLoss(loss, fitted))
    draws = optimizer.draw(random.key(0), result.state)
    for given, names in ((mcmc, None), (draws, shown)):
        axes = plots.gaussian_pair(given, fitted, names=names, params=["at", "width"])
        assert [ax.get_xlabel() for ax in axes[1]] == ["at", "width\n(unconstrained)"]
        plt.close("all")
    # Sites that are given as they are keep their names.
    widths = {"width": np.exp(np.random.default_rng(0).normal(size=(50, 1)))}
    axes = plots.gaussian_pair(widths, Gaussian.isotropic(jnp.ones(1), 1.0))
    assert axes[0, 0].get_xlabel() == "width[0]"


def test_trajectory_over_steps(optimizer, result):
    axes = plots.trajectory(result, optimizer, ["b[1]", 0])
    assert [ax.get_ylabel() for ax in axes] == ["b[1]", "a"]
    path = labeled(axes[0])["centre"].get_ydata()
    np.testing.assert_allclose(path[:-1], result.history.reference.mean[:, 2])
    np.testing.assert_allclose(path[-1], result.state.reference.mean[2])
    light, dark = axes[0].collections
    sd = np.sqrt(result.history.fitted.variance[:, 2])
    low = light.get_paths()[0].vertices[:, 1].min()
    np.testing.assert_allclose(low, np.min(path[1:] - sd), rtol=1e-5)
    high = dark.get_paths()[0].vertices[:, 1].max()
    np.testing.assert_allclose(
        high, np.max(path[1:] + 2 * result.history.fit.mean_error[:, 2]), rtol=1e-5
    )
    plt.close("all")
    assert plots.trajectory(result).shape == (3,)


def test_trajectory_in_principal_directions(optimizer, result):
    (short,) = plots.trajectory(result, optimizer, plane="pca")
    short = labeled(short)["centres"].get_xydata()
    plt.close("all")
    (ax,) = plots.trajectory(result, optimizer, "pca", plane=True)
    np.testing.assert_array_equal(labeled(ax)["centres"].get_xydata(), short)
    lines = labeled(ax)
    path = np.stack(lines["centres"].get_data(), 1)
    centers = np.concatenate([result.history.reference.mean, result.state.reference.mean[None]])
    total = np.sum((centers - centers.mean(0)) ** 2)
    shares = np.sum(path**2, 0) / total
    assert f"({shares[0]:.1%}" in ax.get_xlabel()
    assert f"({shares[1]:.1%}" in ax.get_ylabel()
    assert shares[0] > shares[1]
    np.testing.assert_allclose(np.stack(lines["end"].get_data(), 1)[0], path[-1])
    # In orthonormal directions an ellipse is as long as the standard deviations that it mixes.
    size = np.sqrt(result.history.fitted.variance[-1])
    reach = np.stack(lines["1 sd of the last fit"].get_data(), 1) - path[-1]
    lengths = np.linalg.norm(reach, axis=1)
    assert size.min() * 0.99 < lengths.min() < lengths.max() < size.max() * 1.01


def test_landscape_of_a_quadratic_is_exact_within_errors(line):
    # Through (0.5, 0.2, -0.4) and (0.5, 1, 1), of Hessian (2, 1, 1): no change in a; F and heat in closed form.
    along = np.asarray(line.coordinates[0])
    points = np.asarray(line.origin) + along[:, None] * np.asarray(line.directions)
    hessian, tau = np.array([2.0, 1.0, 1.0]), 0.5
    np.testing.assert_allclose(line.loss, 0.5 * points**2 @ hessian, rtol=1e-4)
    heat = 0.5 * points**2 @ hessian + 0.5 * tau * hessian.sum()
    shrunk = hessian / (1 + tau * hessian)
    entropy = 0.5 * points**2 @ shrunk + 0.5 * np.sum(np.log1p(tau * hessian))
    for estimate, exact in ((line.heat, heat), (line.local_entropy, entropy)):
        assert np.all(np.abs(estimate.value - exact) < SIGMAS * estimate.error)
        assert np.all(estimate.error < 0.1 * (1.0 + exact))
    assert line.trusted.all()
    np.testing.assert_allclose(line.others, [[np.hypot(0.8, 1.4)]], rtol=1e-5)
    np.testing.assert_allclose(line.project(points)[:, 0], along, atol=1e-5)


def test_landscape_of_a_double_well_is_exact_within_errors(plane):
    problem = problems.double_well(2)
    for i in range(0, 9, 2):
        for j in range(0, 9, 2):
            x = np.array([plane.coordinates[0][i], plane.coordinates[1][j]])
            exact = problem.local_entropy(x, 0.1, 0.5)
            error = plane.local_entropy.error[i, j]
            assert (
                not plane.trusted[i, j]
                or abs(plane.local_entropy.value[i, j] - exact) < SIGMAS * error
            )
            error = plane.heat.error[i, j]
            assert abs(plane.heat.value[i, j] - problem.heat(x, 0.1)) < SIGMAS * error
    assert plane.trusted.mean() > 0.9


def test_landscape_along_a_line(line, result):
    gaussian = Gaussian.isotropic(jnp.zeros(3), 0.04)
    (ax,) = plots.landscape(line, result, {"prior": gaussian})
    curves = labeled(ax)
    np.testing.assert_allclose(curves["loss"].get_ydata(), line.loss)
    np.testing.assert_allclose(curves["local entropy"].get_ydata(), line.local_entropy.value)
    np.testing.assert_allclose(curves["heat"].get_ydata(), line.heat.value)
    grid, height = curves["prior"].get_data()
    # The projection of zero, and a standard deviation of 0.2 in any direction.
    mean = line.project(np.zeros(3))[0]
    np.testing.assert_allclose(grid[np.argmax(height)], mean, atol=0.02)
    at = np.interp(mean + 0.2, grid, height)
    np.testing.assert_allclose(at / height.max(), np.exp(-0.5), atol=0.01)
    assert "units of the parameters" in ax.get_xlabel()


def test_landscape_over_a_plane(plane):
    dense = Gaussian(jnp.array([1.0, 0.5]), jnp.array([[0.3, 0.0], [0.2, 0.1]]))
    khat = np.full((9, 9), -np.inf)
    khat[0, 0] = 2.0
    estimate = plane.local_entropy._replace(khat=khat, ess=np.zeros((9, 9)))
    axes = plots.landscape(plane._replace(local_entropy=estimate), gaussians={"fit": dense})
    assert [ax.get_title() for ax in axes] == ["loss", "local entropy", "heat"]
    assert (
        (axes[0].get_xlabel(), axes[0].get_ylabel()) == plane.labels == ("params[0]", "params[1]")
    )
    x, y = labeled(axes[1])["fit"].get_data()
    np.testing.assert_allclose([np.ptp(x) / 2, np.ptp(y) / 2], [0.3, np.hypot(0.2, 0.1)], rtol=1e-2)
    # Nothing is drawn where F_tau is not to be trusted.
    corner = (plane.coordinates[0][0], plane.coordinates[1][0])
    for ax, drawn in ((axes[0], True), (axes[1], False)):
        paths = ax.collections[0].get_paths()
        inside = [path.contains_point(corner, radius=s * 1e-4) for path in paths for s in (1, -1)]
        assert any(inside) == drawn


def remarks(legend):
    return legend.get_title().get_text().replace("\n", " ")


def test_a_legend_names_what_is_seen_and_says_what_is_not(line, plane, result):
    far = {"far": Gaussian.isotropic(jnp.full(3, 50.0), 0.1)}
    (ax,) = plots.landscape(line, gaussians=far)
    curves, places = labeled(ax), np.asarray(line.coordinates[0])
    assert ax.get_legend_handles_labels()[1] == [
        "loss",
        "local entropy",
        "heat",
        "other parameters",
    ]
    assert remarks(ax.get_legend()) == "Outside of the figure: far."
    assert not ax.patches
    plt.close("all")
    # One point in the middle, which the shade reaches around; the centres there lie on the loss.
    khat = np.where(np.arange(11) == 5, 1.0, -np.inf)
    estimate = line.local_entropy._replace(khat=khat, ess=np.zeros(11))
    unsure = line._replace(local_entropy=estimate)
    (ax,) = plots.landscape(unsure, result.history)
    middle = (places[4:6] + places[5:7]) / 2
    (shade,) = ax.patches
    np.testing.assert_allclose([shade.get_x(), shade.get_x() + shade.get_width()], middle)
    assert remarks(ax.get_legend()).startswith(
        "Grey: local entropy not finite, or not to be trusted"
    )
    plt.close("all")
    (ax,) = plots.landscape(line._replace(local_entropy=estimate._replace(khat=np.ones(11))))
    assert "local entropy" not in ax.get_legend_handles_labels()[1]
    assert "Outside" not in remarks(ax.get_legend())
    assert curves.keys() >= {"loss", "heat"}
    plt.close("all")
    far = {
        "near": Gaussian.isotropic(jnp.array([1.0, 0.5]), 0.1),
        "far": STANDARD._replace(mean=jnp.full(2, 50.0)),
    }
    error = np.where(np.arange(81).reshape(9, 9) == 3, np.inf, plane.heat.error)
    axes = plots.landscape(plane._replace(heat=plane.heat._replace(error=error)), gaussians=far)
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["near"]
    assert "heat not finite" in remarks(legend)
    assert remarks(legend).endswith("Outside of the figure: far.")
    # Round ticks, and levels that reach all values.
    ticks = [float(text.get_text()) for text in axes[0].figure.axes[-1].get_yticklabels()]
    assert all(len(f"{tick:.10g}".strip("-0.")) <= 3 for tick in ticks)
    assert min(ticks) <= np.min(plane.loss)


def test_levels_are_round_and_reach_all_values():
    rng = np.random.default_rng(0)
    for known in (
        rng.exponential(size=300) ** 4,
        1000 + rng.random(300),
        1e-7 * rng.normal(size=300),
    ):
        levels = plots.grid._levels([known])
        assert levels[0] <= known.min()
        assert levels[-1] >= known.max()
        assert np.all(np.diff(levels) > 0)
        assert levels.size > 10
        assert all(len(f"{level:.8g}".split("e")[0].strip("-0.")) <= 7 for level in levels)


def test_a_loss_that_fails_leaves_gaps():
    loss = Loss.from_function(lambda x: jnp.where(x[0] > 1.0, jnp.nan, x[0] ** 2), jnp.zeros(1))
    report = values.landscape(
        random.key(0), loss, tau=0.01, spans=[(-1.0, 2.0)], num_points=11, num_samples=16
    )
    (ax,) = plots.landscape(report)
    shown = np.isfinite(labeled(ax)["heat"].get_ydata())
    # Four standard deviations to either side of where it fails.
    known = np.asarray(report.coordinates[0])
    assert shown[known < 0.6].all()
    assert not shown[known > 1.4].any()


def test_gaussian_pair_shows_weighted_draws():
    x = np.asarray(random.normal(random.key(0), (2_000, 2)))
    # Weights that make it N((1, 0), I).
    gaussian = Gaussian(jnp.array([1.0, 0.0]), jnp.eye(2))
    axes = plots.gaussian_pair(
        x, gaussian, Gaussian.isotropic(jnp.zeros(2), 0.25), names=["a", "b"], log_weight=x[:, 0]
    )
    assert axes.shape == (2, 2)
    assert not axes[0, 1].axison
    assert (axes[1, 0].get_xlabel(), axes[1, 0].get_ylabel()) == ("a", "b")
    points = np.stack(axes[1, 0].lines[0].get_data(), 1)
    # A thousand draws resampled from some 700 effective ones.
    np.testing.assert_allclose(points.mean(0), [1.0, 0.0], atol=0.15)
    curves = labeled(axes[0, 0])
    peak = curves["forward"].get_xdata()[np.argmax(curves["forward"].get_ydata())]
    np.testing.assert_allclose(peak, 1.0, atol=0.05)
    np.testing.assert_allclose(
        curves["reverse"].get_ydata().max(), 2 / np.sqrt(2 * np.pi), rtol=1e-3
    )
    np.testing.assert_allclose(sum(p.get_height() * p.get_width() for p in axes[0, 0].patches), 1.0)


def test_given_axes_are_used(optimizer, result, line):
    figure, axes = plt.subplots(3, 1)
    assert list(plots.optimization(result, axes=axes[:2])) == list(axes[:2])
    assert plots.landscape(line, axes=axes[0])[0] is axes[0]
    assert plots.trajectory(result, optimizer, plane=True, axes=axes[1])[0] is axes[1]
    x = np.asarray(result.history.reference.mean)
    drawn = plots.gaussian_pair(x, Gaussian.isotropic(jnp.zeros(3), 1.0), params=[0], axes=axes[2])
    assert drawn[0, 0] is axes[2]
    assert plt.get_fignums() == [figure.number]


LOSS = Loss.from_function(lambda x: jnp.sum(x**2), jnp.zeros(3))
KEY = random.key(0)
SAMPLES = np.arange(8.0).reshape(4, 2) ** 2
STANDARD = Gaussian.isotropic(jnp.zeros(2), 1.0)
BAD = [
    (lambda r, o: plots.optimization(3), TypeError, "result of TwoStep.run"),
    (
        lambda r, o: plots.optimization(r.history._replace(ok=np.bool_(True))),
        ValueError,
        "axis of at",
    ),
    (lambda r, o: plots.optimization(r, axes=[1, 2, 3]), TypeError, "axes of matplotlib"),
    (
        lambda r, o: plots.optimization(r, axes=plt.subplots()[1]),
        ValueError,
        r"2 axes, one per panel \(values and progress; tau, which is constant, has none\), got 1",
    ),
    (
        lambda r, o: plots.shift_quality(
            r.history._replace(shift=shift.implicit.ImplicitInfo(1, 0, 0))
        ),
        ValueError,
        "makes draws",
    ),
    (lambda r, o: plots.trajectory(r, o.loss), TypeError, "as a TwoStep"),
    (lambda r, o: plots.trajectory(r, o, ["c"]), ValueError, "name of one of 3"),
    (lambda r, o: plots.trajectory(r, o, [3]), ValueError, "index"),
    (lambda r, o: plots.trajectory(r, o, [1.5]), TypeError, "name or index"),
    (lambda r, o: plots.trajectory(r, o, ["a"], plane=True), ValueError, "two coordinates"),
    (lambda r, o: plots.trajectory(r, o, plane="tsne"), TypeError, 'True, False or "pca"'),
    (lambda r, o: plots.trajectory(r, o, ["a", 1], plane="pca"), ValueError, "no coordinates"),
    (lambda r, o: plots.landscape(r), TypeError, "values.landscape"),
    (lambda r, o: plots.gaussian_pair(SAMPLES), ValueError, "got none"),
    (lambda r, o: plots.gaussian_pair(SAMPLES, 3), TypeError, "Gaussian"),
    (
        lambda r, o: plots.gaussian_pair(SAMPLES, STANDARD, names=["a"]),
        ValueError,
        "one name for each",
    ),
    (lambda r, o: plots.gaussian_pair("draws", STANDARD), TypeError, "samples"),
    (lambda r, o: values.landscape(KEY, bowl, tau=1.0), TypeError, "expected a Loss"),
    (lambda r, o: values.landscape(KEY, LOSS, tau=-1.0), ValueError, "tau"),
    (lambda r, o: values.landscape(KEY, LOSS, tau=1.0), ValueError, "one or two directions"),
    (lambda r, o: values.landscape(KEY, LOSS, tau=1.0, directions="a"), ValueError, "list of one"),
    (lambda r, o: values.landscape(KEY, LOSS, tau=1.0, directions=["a"]), ValueError, "params"),
    (
        lambda r, o: values.landscape(KEY, LOSS, tau=1.0, directions=[[1.0, 0]]),
        ValueError,
        "flat vector",
    ),
    (
        lambda r, o: values.landscape(KEY, LOSS, tau=1.0, directions=[0, 0]),
        ValueError,
        "not on one",
    ),
    (lambda r, o: values.landscape(KEY, LOSS, None, np.zeros(3), tau=1.0), ValueError, "not zero"),
    (
        lambda r, o: values.landscape(KEY, LOSS, None, np.ones(3), tau=1.0, directions=[0]),
        ValueError,
        "the one or the other",
    ),
    (
        lambda r, o: values.landscape(KEY, LOSS, tau=1.0, directions=[0], spans=[(1.0, 0.0)]),
        ValueError,
        "spans",
    ),
    (
        lambda r, o: values.landscape(KEY, LOSS, tau=1.0, directions=[0], num_points=1),
        ValueError,
        "num_points",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call, error, words, result, optimizer):
    with pytest.raises(error, match=words):
        call(result, optimizer)


def test_without_matplotlib_the_extra_is_named(monkeypatch, result):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"numpyro_regloss\[plots\]"):
        plots.optimization(result)
    monkeypatch.undo()


def test_long_names_are_wrapped_and_dollars_are_no_mathematics():
    x = np.random.default_rng(0).normal(size=(50, 2))
    names = [r"$\nothing$", "a_long_name_without_any_slash[12,3]"]
    axes = plots.gaussian_pair(x, Gaussian.isotropic(jnp.zeros(2), 1.0), names=names)
    labels = [ax.get_xlabel() for ax in axes[-1]]
    assert labels[0] == r"\$\nothing\$"  # drawn by the fixture; as mathematics it raises
    assert max(map(len, labels[1].split("\n"))) <= 22
    assert labels[1].replace("\n", "") == names[1]
