"""The one description of an attention call that every backend receives.

:class:`Problem` holds the tensors in one canonical form (4-D, masks expanded to the full score
shape with stride 0 where they broadcast) and every mask ingredient as a field of its own.  It is
validated once, by :func:`make_problem`; backends trust it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: ``Problem.causal`` values, in the order of the engines' enumeration (0 = none).
CAUSAL_MODES = (None, "upper_left", "lower_right")


@dataclass(frozen=True, slots=True)
class Problem:
    """A validated attention problem.

    Shapes: B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv; query head ``h``
    reads key head ``h // (Hq // Hkv)``), Lq queries, Lk keys, D and Dv head dimensions.

    The band.  Causality, window and key lengths restrict query ``i`` of batch ``b`` to one
    contiguous range of keys.  With ``n = key_lengths[b]`` (else Lk) and the position
    ``pos = i + n - Lq`` for causal ``"lower_right"``, else ``pos = i``::

        first allowed key  lo = max(0, pos - left)                      (left None: 0)
        one past the last  hi = min(n, pos + 1 if causal else n, pos + right + 1)   (right None: n)

    ``attn_mask`` (bool, True = attend) and ``bias`` (added to the scaled score) act on top.  A bias
    of -inf forbids the key as a False does; a finite one, finfo.min included, never does.
    """

    query: torch.Tensor  # [B, Hq, Lq, D], last stride 1
    key: torch.Tensor  # [B, Hkv, Lk, D], last stride 1
    value: torch.Tensor  # [B, Hkv, Lk, Dv], last stride 1
    scale: float
    causal: str | None = None  # one of CAUSAL_MODES
    window_left: int | None = None  # keys kept before the position, None = open
    window_right: int | None = None  # keys kept after the position, None = open
    key_lengths: torch.Tensor | None = None  # int64 [B], contiguous, on query's device, 0..Lk
    attn_mask: torch.Tensor | None = None  # bool [B, Hq, Lq, Lk], a stride-0 view where it broadcasts
    bias: torch.Tensor | None = None  # float [B, Hq, Lq, Lk], likewise; query's dtype, or float32
    dropout_p: float = 0.0
    rng_state: torch.Tensor | None = None  # int64 [2] = (seed, offset), on query's device; with dropout

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def lse_dtype(self) -> torch.dtype:
        """float64 for a float64 problem, else float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32
