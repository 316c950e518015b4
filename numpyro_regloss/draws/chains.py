# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""Chains of NumPyro's `MCMC` over the devices of a mesh, in one program that serves all later runs.

NumPyro hands a `chain_method` the function that runs one chain, with the data bound to it. Mapped and compiled
as it comes, it would be a new function with new constants at every run. What it consists of decides here whether
it is the same program; what changes from run to run are the arguments of that program.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_regloss._core.processes import placed
from numpyro_regloss._core.pytree import Partition, with_context_axes
from numpyro_regloss.losses.captured import AsRead, handle
from numpyro_regloss.losses.environment import digest

__all__ = ["ShardedChains", "sharded"]

# Programs that are kept, with the data that were compiled into them.
KEPT = 16
# What a run leaves in an `MCMC`, and what it is given anew: none of it says what the program does.
RESULTS = {"_args", "_kwargs", "_states", "_states_flat", "_last_state", "_warmup_state"}
CACHES = {"_init_state_cache", "_cache"}


@dataclasses.dataclass(frozen=True)
class ShardedChains:
    """What `sharded` returns: a `chain_method` for `numpyro.infer.MCMC`. Equal for equal meshes.

    Attributes:
        mesh: the devices, all axes of type Auto.
        axis: names of the axes that divide the chains.
    """

    mesh: Mesh
    axis: tuple[str, ...]

    def __call__(self, run_chain: Callable[..., Any]) -> Callable[[Any], Any]:
        """The function that runs all chains, from that of one; called by `MCMC.run`.

        Args:
            run_chain: NumPyro's function of one chain.

        Returns:
            A function of the keys, states and start values of all chains.

        Raises:
            TypeError: if `run_chain` is not a chain of `MCMC`, or its kernel moves all chains together.
            ValueError: if the devices do not divide the number of chains.
        """
        mcmc = getattr(getattr(run_chain, "func", None), "__self__", None)
        if not isinstance(run_chain, functools.partial) or not isinstance(mcmc, MCMC):
            raise TypeError(
                "sharded: expected to be called by numpyro.infer.MCMC, got a function that is none of its chains; "
                "pass MCMC(kernel, chain_method=sharded(mesh)), or use jax.shard_map for functions of your own."
            )
        if mcmc.sampler.is_ensemble_kernel:
            raise TypeError(
                f"sharded: expected a kernel of independent chains, got {type(mcmc.sampler).__name__}, whose "
                'chains move together; use chain_method="vectorized".'
            )
        devices = math.prod(self.mesh.shape[name] for name in self.axis)
        if mcmc.num_chains % devices:
            raise ValueError(
                f"sharded: expected num_chains as a multiple of {devices}, the devices along {self.axis} of the "
                f"mesh, got {mcmc.num_chains}; take {devices * math.ceil(mcmc.num_chains / devices)} chains, or a "
                "smaller mesh."
            )
        return functools.partial(_run, self, mcmc, run_chain.keywords)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles of an `MCMC`: devices by their number, since JAX pickles none."""
        numbers = np.vectorize(lambda device: device.id, otypes=[int])(self.mesh.devices)
        return _on_devices, (numbers, self.mesh.axis_names, self.axis)

    def put(self, leaf: Any, spec: PartitionSpec) -> Any:
        """Puts an array on the mesh; on that of several processes from the same array in each of them."""
        return placed(leaf, NamedSharding(self.mesh, spec))

    def put_data(self, leaf: Any) -> Any:
        """Puts what all chains see on the mesh: copies, or divided along other axes as it was."""
        sharding = None if isinstance(leaf, Tracer) or np.ndim(leaf) == 0 else leaf.sharding
        if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != self.mesh.shape:
            return self.put(leaf, PartitionSpec())
        names = [(axes,) if isinstance(axes, str) else axes or () for axes in sharding.spec]
        others = [tuple(name for name in axes if name not in self.axis) or None for axes in names]
        return self.put(leaf, PartitionSpec(*others))


def sharded(mesh: Mesh, axis: str | tuple[str, ...] | None = None) -> ShardedChains:
    """Divides the chains of NumPyro's `MCMC` among devices: `MCMC(kernel, chain_method=sharded(mesh))`.

    Each device runs `num_chains` / devices chains, vectorized. The draws are those of
    `chain_method="vectorized"`, up to rounding. The program is compiled once: another run, another `MCMC` with the
    same settings, kernel settings and model function, and with `jit_model_args=True` new data of the same
    shapes, compile nothing. Data that a model reads from closures and globals are part of the program: numbers,
    arrays and containers of them by value, other objects by identity. With `jit_model_args=True` arrays and floats
    among the model's arguments may change; integers, booleans and strings set the size of plates and choose
    branches as usual, and new ones compile. Without it all arguments are constants of the program, except for
    arrays that lie on several devices.

    Where the mesh spans several processes, each of them makes the same call with the same key and the same data;
    the draws then lie on all of them, and `jax.experimental.multihost_utils.process_allgather(draws, tiled=True)`
    brings them to each. Data that are divided along another axis of the mesh stay divided. NumPyro has no
    progress bar for such chains and warns unless it has `progress_bar=False`; a single chain runs as usual, on one
    device.

    Args:
        mesh: the devices, from `jax.make_mesh`; its axes may be Explicit (JAX's default) or Auto.
        axis: name of the axis, or names of the axes, along which chains are divided; None for `"draws"` where the
            mesh has an axis of that name, or for its only one.

    Returns:
        A `chain_method`. Those of equal meshes are equal.

    Raises:
        TypeError: if `mesh` is not a `jax.sharding.Mesh`.
        ValueError: if the mesh has no such axis, or several and none is named; by `MCMC.run` if `num_chains`
            is not a multiple of the number of devices along the axis.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_regloss import Gaussian, Loss, RegularizedLoss, model, sharded
        >>> mesh = jax.make_mesh((jax.device_count(),), ("draws",))
        >>> loss = Loss.from_function(lambda x: 0.5 * jnp.sum(x**2), jnp.ones(2))
        >>> target = RegularizedLoss(loss, Gaussian.isotropic(loss.x0, tau=1.0))
        >>> mcmc = MCMC(
        ...     NUTS(model), num_warmup=200, num_samples=250, num_chains=8, chain_method=sharded(mesh),
        ...     jit_model_args=True, progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(0), target)
        >>> bool(jnp.all(jnp.abs(mcmc.get_samples()["x"].mean(0) - 0.5) < 0.1))
        True
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "sharded: expected a mesh of devices such as jax.make_mesh((jax.device_count(),), ('draws',)), got "
            f"{type(mesh).__name__}."
        )
    names = mesh.axis_names
    if axis is None and "draws" not in names and len(names) != 1:
        raise ValueError(
            f"sharded: expected a mesh with one axis or with one named 'draws', got {names}; say which axis "
            "divides the chains: sharded(mesh, axis=...)."
        )
    axis = ("draws" if "draws" in names else names[0]) if axis is None else axis
    axis = (axis,) if isinstance(axis, str) else tuple(axis)
    if not axis or len(set(axis)) < len(axis) or not set(axis) <= set(names):
        raise ValueError(f"sharded: expected axis as one of, or some of, {names}, got {axis}.")
    auto = Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
    return ShardedChains(auto, axis)


def _on_devices(
    numbers: np.ndarray, names: tuple[str, ...], axis: tuple[str, ...]
) -> ShardedChains:
    here = {device.id: device for device in jax.devices()}
    if not set(numbers.flat) <= here.keys():
        raise ValueError(
            f"sharded: expected the devices {numbers.tolist()} of the mesh that was pickled, got {sorted(here)}; "
            "load it where they are, or keep mcmc.get_samples() instead."
        )
    devices = np.vectorize(here.get, otypes=[object])(numbers)
    return sharded(Mesh(devices, names), axis)


def _run(chains: ShardedChains, mcmc: MCMC, bound: dict[str, Any], inputs: Any) -> Any:
    arguments = bound["args"], bound["kwargs"]
    bound = {name: value for name, value in bound.items() if name not in ("args", "kwargs")}
    if mcmc._jit_model_args:
        split = Partition(
            arguments, lambda path: f"MCMC.run: argument {jax.tree_util.keystr(path)}"
        )
        leaves, treedef = jax.tree.flatten(split)
        what: Hashable = treedef

        def join(leaves: Any) -> Any:
            return jax.tree.unflatten(treedef, leaves).tree

    else:
        leaves, what, join = _constants(arguments)
    program = _Program(chains, mcmc, bound, join, (what, _fingerprint(bound)))
    inputs = jax.tree.map(lambda leaf: chains.put(leaf, PartitionSpec(chains.axis)), inputs)
    leaves = [chains.put_data(leaf) for leaf in leaves]
    # The program has its own mesh; JAX refuses one beside that of jax.set_mesh.
    alone = jax.sharding.get_abstract_mesh().empty
    with contextlib.nullcontext() if alone else jax.set_mesh(chains.mesh):
        found = _compiled(program)(inputs, leaves)
    return with_context_axes(found)


def _constants(arguments: Any) -> tuple[list[Any], Hashable, Callable[[Any], Any]]:
    """What of the arguments is traced, what the rest is compared by, and how to put them together."""
    values, structure = jax.tree.flatten(with_context_axes(arguments, divided=True))
    # One program cannot have constants of another process.
    traced = [isinstance(v, jax.Array) and len(v.sharding.device_set) > 1 for v in values]
    kept = [None if moves else value for moves, value in zip(traced, values, strict=True)]

    def join(leaves: Any) -> Any:
        rest = iter(leaves)
        both = zip(traced, kept, strict=True)
        return jax.tree.unflatten(structure, [next(rest) if m else value for m, value in both])

    leaves = [value for moves, value in zip(traced, values, strict=True) if moves]
    return leaves, (structure, tuple(traced), _fingerprint(kept)), join


class _Program:
    """What the chains of a run compile: equal where all that the trace reads is."""

    def __init__(
        self,
        chains: ShardedChains,
        mcmc: MCMC,
        fields: dict[str, Any],
        join: Callable[[Any], Any],
        what: Hashable,
    ) -> None:
        settings = {k: v for k, v in vars(mcmc).items() if k not in RESULTS | CACHES}
        self.chains, self.fields, self.join = chains, fields, join
        self.mcmc = copy.copy(mcmc)
        # The run's own numbers are not kept alive, and what the user sets later changes nothing here.
        vars(self.mcmc).update(dict.fromkeys(RESULTS), _init_state_cache={}, _cache={})
        self.mcmc._collection_params = dict(mcmc._collection_params)
        self.mcmc._jit_model_args = False
        self.mcmc.sampler = _untouched(mcmc.sampler)
        self.what = chains, what, _fingerprint(settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.what == other.what

    def __hash__(self) -> int:
        return hash(self.what)

    def run_chain(self, arguments: tuple[Any, Any], inputs: Any) -> Any:
        """One chain, by NumPyro, of a kernel that no other trace has touched."""
        mcmc = copy.copy(self.mcmc)
        mcmc.sampler = _untouched(self.mcmc.sampler)
        mcmc._args, mcmc._kwargs = arguments
        return mcmc._single_chain_mcmc(inputs, *arguments, **self.fields)


@functools.lru_cache(maxsize=KEPT)
def _compiled(program: _Program) -> Callable[[Any, Any], Any]:
    chains = program.chains

    def run_chains(inputs: Any, leaves: Any) -> Any:
        return jax.vmap(functools.partial(program.run_chain, program.join(leaves)))(inputs)

    divided = PartitionSpec(chains.axis)
    # The axes of data stay with XLA, which divides what it computes from them.
    return jax.jit(
        jax.shard_map(
            run_chains,
            mesh=chains.mesh,
            in_specs=(divided, PartitionSpec()),
            out_specs=divided,
            axis_names=set(chains.axis),
            # NumPyro's loops begin with constants, which are the same on all devices, and end with what is not.
            check_vma=False,
        )
    )


def _untouched(value: Any) -> Any:
    """A copy of a kernel, and of the kernels in it, in which a trace may leave what it likes."""
    if isinstance(value, MCMCKernel):
        kernel = copy.copy(value)
        vars(kernel).update({name: _untouched(part) for name, part in vars(kernel).items()})
        return kernel
    if type(value) in (list, tuple):
        return type(value)(map(_untouched, value))
    return {k: _untouched(v) for k, v in value.items()} if type(value) is dict else value


def _fingerprint(value: Any) -> Hashable:
    """What a setting is compared by: kernels and containers by their parts, arrays of the host by content."""
    if isinstance(value, MCMCKernel):
        return type(value), _fingerprint(vars(copy.copy(value)))
    if isinstance(value, dict):
        return dict, tuple((_fingerprint(k), _fingerprint(v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(map(_fingerprint, value))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return digest(value)
    if isinstance(value, functools.partial):
        return functools.partial, _fingerprint((value.func, value.args, value.keywords))
    # A model whose data were replaced since, wherever it reads them, is another program.
    if isinstance(value, types.FunctionType | types.MethodType):
        return AsRead(value)
    try:
        hash(value)
    except TypeError:
        return handle(value)
    # 1, 1.0 and True are equal and compile different programs.
    return type(value), value
