"""torch.fx: the functions and modules of this package are single nodes of a symbolic trace.

``torch.fx.symbolic_trace`` runs a model on proxies, which have neither shapes nor values. It does not look inside
the modules of ``torch.nn``, and here this package's modules and functions ask not to be looked into either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.fx import Proxy


def is_symbolic(arguments: Iterable) -> bool:
    """Is any of the arguments a proxy?"""
    return any(isinstance(argument, Proxy) for argument in arguments)


def record_function_call(function: Callable, arguments: tuple, **options) -> Proxy:
    """The node of a call of ``function``, whose first ``arguments`` tell which trace it belongs to."""
    proxies = [argument for argument in (*arguments, *options.values()) if isinstance(argument, Proxy)]
    return torch.overrides.handle_torch_function(function, proxies, *arguments, **options)


class LeafModule(nn.Module):
    """A module whose call is one node of a symbolic trace, as a call of nn.MultiheadAttention is."""

    def _call_impl(self, *arguments, **options):
        # Before the hooks run: they run when the node does.
        for argument in (*arguments, *options.values()):
            if isinstance(argument, Proxy):
                tracer = argument.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, options)
        return super()._call_impl(*arguments, **options)
