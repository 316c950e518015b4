# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Figures of `training.py`, from its tables."""

import re


def draw(folder, tables, suffix):
    """One file for each table that has a figure; returns their paths by the letter of the experiment."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "training"
    import matplotlib.pyplot as plt  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for title, rows in tables.items():
        drawer = next((one for start, one in DRAWERS.items() if title.startswith(start)), None)
        if drawer is None or not rows:
            continue
        figure = drawer(plt, rows)
        if figure.get_layout_engine() is None:
            figure.tight_layout()
        paths[title[0]] = folder / f"{title[0]}{suffix}.svg"
        # Equal files of equal tables.
        figure.savefig(paths[title[0]], metadata={"Date": None})
        plt.close(figure)
    return paths


def _error(row, name):
    return row[f"± {name}"] or 0.0


def _from_start(plt, rows):
    widths = sorted({row["hidden"] for row in rows})
    taus = sorted({row["tau"] for row in rows if row["tau"] is not None}) or [None]
    figure, axes = plt.subplots(
        len(widths),
        len(taus),
        squeeze=False,
        sharex=True,
        layout="constrained",
        figsize=(3.5 * len(taus) + 1.5, 3 * len(widths)),
    )
    methods, lines = list(dict.fromkeys(row["method"] for row in rows)), {}
    columns = [name for name in rows[0] if re.fullmatch(r"\d+", name)]
    updates = [int(name) for name in columns]
    for i, width in enumerate(widths):
        for j, tau in enumerate(taus):
            ax = axes[i, j]
            for row in rows:
                if row["hidden"] == width and row["tau"] in {tau, None}:
                    # Errors, on a scale on which small ones can be told apart.
                    shown = [100 - row[name] for name in columns]
                    errors = [_error(row, name) for name in columns]
                    color = f"C{methods.index(row['method'])}"
                    lines[row["method"]] = ax.errorbar(
                        updates, shown, errors, color=color, capsize=2
                    )
            ax.set(title=f"{width} hidden units" + (f", tau {tau:g}" if tau else ""))
            ax.set(xlabel="updates", ylabel="test errors in per cent", yscale="log")
            ax.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
            ax.minorticks_off()
    figure.legend(lines.values(), lines, loc="outside right center", fontsize="small")
    return figure


def _budgets(plt, rows):
    noises = sorted({row["label noise"] for row in rows})
    names = ("accuracy", "NLL", "ECE")
    figure, axes = plt.subplots(1, len(names), figsize=(13, 4))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for ax, name in zip(axes, names, strict=True):
        for i, method in enumerate(methods):
            some = [row for row in rows if row["method"] == method and row[name] is not None]
            # Side by side, so that bars of equal results can be told apart.
            places = [noises.index(row["label noise"]) + 0.08 * i for row in some]
            errors = [_error(row, name) for row in some]
            ax.errorbar(
                places, [row[name] for row in some], errors, fmt="o", capsize=2, label=method
            )
        ax.set_xticks(
            [i + 0.04 * (len(methods) - 1) for i in range(len(noises))],
            [f"{n:.0%}" for n in noises],
        )
        ax.set(xlabel="wrong labels in training", title=name)
    axes[0].legend(fontsize="small")
    return figure


def _along(plt, rows):
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 4))
    for name in dict.fromkeys(row["network"] for row in rows):
        some = [row for row in rows if row["network"] == name]
        for ax, x in zip(axes, ("evaluations", "seconds"), strict=True):
            errors = [_error(row, "accuracy") for row in some]
            ax.errorbar(
                [row[x] for row in some],
                [row["accuracy"] for row in some],
                errors,
                capsize=2,
                label=name,
            )
            ax.set(xlabel=x)
    axes[0].set(ylabel="test accuracy in per cent")
    axes[0].legend()
    return figure


def _sweep(plt, rows):
    figure, ax = plt.subplots(figsize=(5, 4))
    errors = [_error(row, "accuracy") for row in rows]
    ax.errorbar(
        [r["tau"] for r in rows], [r["accuracy"] for r in rows], errors, fmt="o-", capsize=2
    )
    ax.set(xscale="log", xlabel="tau", ylabel="test accuracy in per cent")
    return figure


DRAWERS = {"a. Test": _from_start, "c. After": _budgets, "d. Along": _along, "e. Test": _sweep}
