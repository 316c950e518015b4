# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Tables of `training.py` as Markdown, one file for each experiment, which docs/training.md includes."""

import math

# A page has room for so many columns; the figure shows these.
LEFT_OUT = ("200", "400", "losses / update")


def write(folder, tables, figures, suffix):
    """Writes `a.md`, `b.md`, ...; returns their paths.

    Args:
        folder: of the files.
        tables: rows by title, which begins with the letter of the experiment.
        figures: paths by letter, in the same folder.
        suffix: of the files' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for letter in sorted({title[0] for title in tables}):
        parts = []
        if letter in figures:
            name = f"{folder.name}/{figures[letter].name}"
            parts.append(f"```{{image}} {name}\n:alt: the results as a figure\n```\n")
        parts += [
            f"**{title[3:]}**\n\n{_table(rows)}\n"
            for title, rows in tables.items()
            if title.startswith(letter)
        ]
        paths.append(folder / f"{letter}{suffix}.md")
        paths[-1].write_text("\n".join(parts))
    return paths


def _table(rows):
    spreads = {name for name in rows[0] if name.startswith("± ") and name[2:] in rows[0]}
    names = [name for name in rows[0] if name not in {*spreads, *LEFT_OUT}]
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(row, name) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row, name):
    value, spread = row[name], row.get(f"± {name}")
    if value is None:
        return "–"
    if isinstance(value, float) and spread is not None:
        # Two digits of the spread over seeds, or nearly.
        decimals = min(6, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 else 2
        return f"{value:.{decimals}f} ± {spread:.{decimals}f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
