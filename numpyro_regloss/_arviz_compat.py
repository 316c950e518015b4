# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""The container of ArviZ's generation: the only branch on it, taken by feature."""

from typing import Any

__all__ = ["wrap"]


def wrap(groups: dict[str, Any], attrs: dict[str, Any]) -> Any:
    """Labelled datasets as what ArviZ works with.

    Args:
        groups: an `xarray.Dataset` per group.
        attrs: attributes of the whole.

    Returns:
        An `xarray.DataTree` under ArviZ 1.x, an `arviz.InferenceData` under 0.23.
    """
    import arviz as az  # noqa: PLC0415
    import xarray as xr  # noqa: PLC0415

    if hasattr(az, "convert_to_datatree"):
        tree = xr.DataTree.from_dict(groups)
        tree.attrs.update(attrs)
        return tree
    return az.InferenceData(attrs=attrs, **groups)
