"""Which family of kernels a launch belongs to, and how to do without a family that is dead.

Stages are named by family, so that what hangs or crashes is counted against the kernel that did it, and
against no other: ``hopper/fused/d128``, ``plain/grad_query``. A Hopper kernel's number is that of its tile's
columns: D = 96 runs the kernel of 128.
"""

from __future__ import annotations

import dataclasses
import os

#: Families, separated by commas, that this process and its children are to do without.
DEAD = "FASTATTN_GPU_DEAD"

GRADIENTS = ("grad_query", "grad_key", "grad_value")
RESULTS = {
    "forward": ("out", "lse"),
    "keys": ("grad_key", "grad_value"),
    "queries": ("grad_query",),
    "fused": GRADIENTS,
    "grad_key_value": ("grad_key", "grad_value"),
    "grad_query": ("grad_query",),
    "grad_bias": ("grad_bias",),
}


def families_of(problem, engine: str, direction: str) -> dict[str, tuple[str, ...]]:
    """The families that compute a problem's "forward" or "backward", each with the results that it writes.

    ``engine``: "triton" as the backend dispatches it, "plain" or "hopper" for half of it, or another backend, which
    is one family for each direction.
    """
    if engine == "triton":
        from fastattn.backends import triton

        engine = "plain" if triton.hopper_reasons(problem, direction) else "hopper"
    if engine == "hopper":
        return _hopper(problem, direction)
    if engine == "plain":
        return _plain(problem, direction)
    bias = ("grad_bias",) if problem.bias is not None else ()
    return {f"{engine}/{direction}": RESULTS["forward"] if direction == "forward" else (*GRADIENTS, *bias)}


def family_of(problem, engine: str, direction: str) -> str:
    """The same as one label."""
    return " + ".join(families_of(problem, engine, direction))


def _plain(problem, direction: str) -> dict[str, tuple[str, ...]]:
    if direction == "forward":
        from fastattn.kernels import launch

        return {"plain/decode" if launch.splits_keys(problem) else "plain/forward": RESULTS["forward"]}
    kernels = ("grad_key_value", "grad_query") + (("grad_bias",) if problem.bias is not None else ())
    return {f"plain/{kernel}": RESULTS[kernel] for kernel in kernels}


def _hopper(problem, direction: str) -> dict[str, tuple[str, ...]]:
    from fastattn.kernels.hopper.configs import tile_columns

    columns = tile_columns(problem.query.shape[-1])
    if direction == "forward":
        return {f"hopper/forward/d{columns}": RESULTS["forward"]}
    from fastattn.kernels.hopper.launch_backward import chosen_config
    from fastattn.kernels.hopper.plan import band_of

    config = chosen_config(problem, band_of(problem))
    if not config.fused:
        return {f"hopper/{kernel}/d{columns}": RESULTS[kernel] for kernel in ("keys", "queries")}
    ordered = "fused" if config.ordered else "fused_unordered"
    return {f"hopper/{ordered}/d{columns}": RESULTS["fused"]}


def dead_families() -> frozenset[str]:
    """The families that this process is to do without."""
    return frozenset(filter(None, os.environ.get(DEAD, "").split(",")))


def is_dead(name: str) -> bool:
    return name in dead_families()


def leave_out_dead() -> None:
    """Let the dispatch of this process avoid the families named in the environment variable DEAD.

    Instead of a dead fused kernel the two sweeps run, instead of any other of Hopper's a plain one.
    """
    dead = dead_families()
    if not any(name.startswith("hopper/") for name in dead):
        return
    from fastattn.backends import triton
    from fastattn.kernels import remembered
    from fastattn.kernels.hopper import configs

    for (columns, banded), config in configs.BACKWARD.items():
        if f"hopper/fused/d{columns}" in dead:
            configs.BACKWARD[columns, banded] = dataclasses.replace(config, fused=False)
    remembered.forget()
    reasons = triton.hopper_reasons

    def hopper_reasons(problem, direction: str) -> list[str]:
        why = reasons(problem, direction)
        if not why:
            why = [f"{name} is dead" for name in families_of(problem, "hopper", direction) if name in dead]
        return why

    triton.hopper_reasons = hopper_reasons
