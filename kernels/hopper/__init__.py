"""Attention for Hopper GPUs (capability 9.x), written in Gluon: TMA, wgmma, specialised warps.

Called by the Triton backend before its plain kernels, for the problems that :func:`reasons` accepts:

    reasons(problem) -> list[str]                    why these kernels cannot take a problem ([] = they can)
    forward(problem, out, lse, config=None)
    backward(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config=None)

``config`` overrides the choice of configs.py (tuning, ablations).
"""

from .capability import reasons
from .configs import BackwardConfig, ForwardConfig

__all__ = ["BackwardConfig", "ForwardConfig", "backward", "forward", "reasons"]


def forward(problem, out, lse, config=None):
    """Write out [B, Hq, Lq, D] and lse [B, Hq, Lq] (fp32, natural logarithm) of a problem that
    :func:`reasons` accepts."""
    from .launch import forward as launch

    launch(problem, out, lse, config)


def backward(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config=None):
    """Write the gradients that are not None; see launch_backward.py."""
    from .launch_backward import backward as launch

    launch(problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, config)
