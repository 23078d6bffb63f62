"""Is a contender's result right at a size whose scores would not fit? One head says so exactly.

The last head of the last batch entry (with its whole group of query heads, and all that a wrong
offset would spoil) is compared with the float64 reference; every other element with the first
contender that was right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contenders import Setup

PEER_TOLERANCE = 3e-2  # relative Frobenius error: a wrong result is far above, a 16-bit one far below


class Truth:
    """The exact results of one slice of a set-up."""

    def __init__(self, setup: Setup, with_gradients: bool) -> None:
        from fastattn import testing
        from fastattn.problem import make_problem

        self.setup = setup
        self.first: dict[str, Tensor] = {}
        self.skipped = setup.variant == "dropout"  # each draws its own; part check judges fastattn's
        if self.skipped:
            return
        group = setup.heads // setup.kv_heads
        self.query_heads = slice(setup.heads - group, setup.heads)
        self.kv_heads = slice(setup.kv_heads - 1, setup.kv_heads)
        last = slice(setup.batch - 1, setup.batch)
        q = setup.tensors["query"].detach()[last, self.query_heads]
        k, v = (setup.tensors[name].detach()[last, self.kv_heads] for name in ("key", "value"))
        arguments = setup.arguments()
        mask = arguments["attn_mask"]
        if mask is not None:
            arguments["attn_mask"] = mask.detach()[:, self.query_heads if mask.shape[1] > 1 else slice(None)]
        if arguments["key_lengths"] is not None:
            arguments["key_lengths"] = arguments["key_lengths"][last]
        self.problem = make_problem(q, k, v, **(arguments | {"enable_gqa": True}))
        self.grad_out = setup.tensors["grad_out"][last, self.query_heads] if with_gradients else None
        self.exact = testing.run_reference(self.problem, self.grad_out)
        self.naive = testing.run_reference(self.problem, self.grad_out, dtype=None)

    def judge(self, results: dict[str, Tensor], strict: bool) -> float | None:
        """The worst error as a fraction of the budget; raises AssertionError for a wrong result.

        ``results``: full tensors by name, out and gradients, any of them. ``strict``: within the
        project's error budget; else within a tolerance that shows a bug.
        """
        from fastattn import testing

        for name, tensor in results.items():
            if not tensor.isfinite().all():
                raise AssertionError(f"{name} is not finite everywhere")
        if self.skipped:
            return None
        sliced = {
            name: tensor.detach()[-1:, self.kv_heads if name in ("grad_key", "grad_value") else self.query_heads]
            for name, tensor in results.items()
            if name in self.exact and name != "grad_bias"  # its sum over the batch is not the slice's
        }
        judge = testing.assert_within_budget if strict else testing.judge
        judgements = judge(sliced, self.problem, self.exact, self.naive, self.grad_out)
        for name, tensor in sliced.items():
            _assert_close(tensor, self.exact[name], f"{name} of the last head")
        for name, tensor in results.items():
            _assert_close(tensor, self.first.setdefault(name, tensor), f"{name} against the first contender's")
        return round(max(j.error / j.budget for j in judgements if j.budget > 0), 3)


def _assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = torch.linalg.vector_norm(expected.double())
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    if not error <= PEER_TOLERANCE * scale:
        raise AssertionError(f"{what}: relative error {(error / scale).item():.2e}")
