# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Rows of equal size in a file that only grows, so that a checkpoint costs what is new, however long the run.

A row is the bytes of its leaves, one after another, and a checksum. What a crash leaves of a row beyond the last
checkpoint is written over; what is before it is never touched again.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["Rows"]


class Rows:
    """A file of rows, open for reading and writing.

    Args:
        path: of the file.
        row: shapes and types of one row, a pytree.
    """

    def __init__(self, path: Path, row: Any) -> None:
        self.path = path
        leaves, self.structure = jax.tree.flatten(row)
        self.types = [(np.dtype(leaf.dtype), tuple(leaf.shape)) for leaf in leaves]
        self.widths = [t.itemsize * int(np.prod(shape, dtype=int)) for t, shape in self.types]
        self.size = sum(self.widths) + 4
        # Not "a+b": that writes at the end, whatever was sought.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # Without a buffer: on a full disk it would be written again when the file is closed.
        self.file = os.fdopen(descriptor, "r+b", buffering=0)

    def write(self, tree: Any, start: int) -> None:
        """Writes rows, to the disk and not only to its cache.

        Args:
            tree: the rows, with a leading axis.
            start: where the first of them stands; what is behind it is dropped.

        Raises:
            OSError: if they cannot be written.
        """
        leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(tree)]
        count = len(leaves[0])
        data = np.empty((count, self.size), np.uint8)
        place = 0
        for leaf, width in zip(leaves, self.widths, strict=True):
            data[:, place : place + width] = leaf.reshape(count, -1).view(np.uint8)
            place += width
        sums = np.array([zlib.crc32(row[:-4].data) for row in data], "<u4")
        data[:, -4:] = sums[:, None].view(np.uint8)
        self.file.truncate(start * self.size)
        self.file.seek(start * self.size)
        rest = memoryview(data.reshape(-1).data)
        while rest:
            rest = rest[self.file.write(rest) :]
        os.fsync(self.file.fileno())

    def read(self, count: int) -> Any:
        """The first rows.

        Args:
            count: how many.

        Returns:
            The tree, with a leading axis.

        Raises:
            ValueError: if there are fewer, or one is damaged.
        """
        known = os.fstat(self.file.fileno()).st_size // self.size
        if known < count:
            raise ValueError(f"{self.path} has {known} rows and not {count}")
        data = np.fromfile(self.path, np.uint8, count * self.size).reshape(count, self.size)
        sums = np.ascontiguousarray(data[:, -4:]).view("<u4").ravel()
        for i, row in enumerate(data):
            if zlib.crc32(row[:-4].data) != sums[i]:
                raise ValueError(f"{self.path} is damaged at its row {i}")
        leaves, place = [], 0
        for (dtype, shape), width in zip(self.types, self.widths, strict=True):
            part = np.ascontiguousarray(data[:, place : place + width])
            # Of a leaf without numbers there are no bytes to look at.
            leaves.append(
                part.view(dtype).reshape(count, *shape)
                if width
                else np.empty((count, *shape), dtype)
            )
            place += width
        return jax.tree.unflatten(self.structure, leaves)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
