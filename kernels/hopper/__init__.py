"""Attention for Hopper GPUs (capability 9.x), written in Gluon: TMA, wgmma, specialised warps.

Called by the Triton backend before its plain kernels, for the problems that :func:`reasons` accepts:

    reasons(problem) -> list[str]                    why these kernels cannot take a problem ([] = they can)
    launch.forward(problem, out, lse, config=None)
    launch_backward.backward(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config=None)

``config`` overrides the choice of configs.py (tuning, ablations). The launches are in modules of their own because
they import Gluon; here a function ``forward`` would be replaced by the module of that name once it is imported.
"""

from .capability import reasons
from .configs import BackwardConfig, ForwardConfig

__all__ = ["BackwardConfig", "ForwardConfig", "reasons"]
