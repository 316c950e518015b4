# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Reports in notebooks: a plain table and sentences, in the notebook's own colors."""

import html
from collections.abc import Iterable, Sequence

__all__ = ["as_html"]


def as_html(*parts: str | Sequence[Sequence[str]]) -> str:
    """Sentences and tables, with all texts escaped.

    Args:
        *parts: in order. A text is one paragraph per line, where empty lines are left out; a table is a list of
            rows, the names of the columns first.

    Returns:
        HTML without styles.
    """
    return "\n".join(
        line for part in parts for line in (_texts(part) if isinstance(part, str) else _table(part))
    )


def _texts(text: str) -> Iterable[str]:
    return [f"<p>{html.escape(line)}</p>" for line in text.splitlines() if line.strip()]


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    head, *body = rows
    return [
        "<table>",
        f"<thead><tr>{_cells('th', head)}</tr></thead>",
        "<tbody>",
        *(f"<tr>{_cells('td', row)}</tr>" for row in body),
        "</tbody>",
        "</table>",
    ]


def _cells(tag: str, row: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
