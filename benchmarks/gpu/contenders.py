"""What is compared: fastattn, and each peer forced to be itself.

A contender is ``build(setup) -> forward``, with ``forward()`` computing attention of the set-up's
tensors. It raises :class:`worker.Unsupported` where it cannot do the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .families import is_dead
from .problems import DTYPES, environment
from .worker import Unsupported

NAIVE_LIMIT_BYTES = 9e9  # of scores; the backward pass holds about six times that

WINDOW = 256
DROPOUT = 0.1

#: Matrix products of each direction. The backward's kernels compute S and dP twice; useful are five.
PRODUCTS = {"forward": 2, "backward": 5, "grad_key_value": 4, "grad_query": 3}

#: Variants of a call, beside the plain one.
VARIANTS = ("padding_50", "padding_25", "window", "mask", "mask_heads", "bias", "bias_grad", "dropout")


@dataclass
class Setup:
    """One call in the terms of all contenders. Random tensors; [B, H, L, D], contiguous."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    causal: str | None = None
    variant: str | None = None
    device: str = "cuda"
    backend: str = "triton"
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.queries + self.head_dim)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=self.device)
            return values.to(DTYPES[self.dtype])

        for name, heads, length in (
            ("query", self.heads, self.queries),
            ("key", self.kv_heads, self.keys),
            ("value", self.kv_heads, self.keys),
        ):
            self.tensors[name] = random(self.batch, heads, length, self.head_dim).requires_grad_()
        self.tensors["grad_out"] = random(self.batch, self.heads, self.queries, self.head_dim)
        if self.variant in ("mask", "mask_heads"):
            heads = self.heads if self.variant == "mask_heads" else 1
            shape = (1, heads, self.queries, self.keys)
            self.tensors["mask"] = torch.rand(shape, generator=generator, device=self.device) < 0.7
        if self.variant in ("bias", "bias_grad"):
            bias = random(1, self.heads, self.queries, self.keys)
            self.tensors["bias"] = bias.requires_grad_(self.variant == "bias_grad")

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        names = ("query", "key", "value") + (("bias",) if self.variant == "bias_grad" else ())
        return [self.tensors[name] for name in names]

    @property
    def key_lengths(self) -> list[int] | None:
        """Ragged lengths whose mean is the kept share."""
        if self.variant not in ("padding_50", "padding_25"):
            return None
        kept = {"padding_50": 0.5, "padding_25": 0.25}[self.variant] * self.keys
        spread = [(2 * i + 1) / self.batch - 1 for i in range(self.batch)]  # symmetric, within (-1, 1)
        return [max(1, int(kept * (1 + 0.9 * s))) for s in spread]

    @property
    def window(self) -> tuple[int, int] | None:
        return (WINDOW, 0) if self.variant == "window" else None

    @property
    def pairs(self) -> float:
        """Pairs of query and key that the band allows, of all heads: the useful work."""
        lengths = self.key_lengths or [self.keys] * self.batch
        if self.causal is None and self.window is None:
            return float(self.heads * self.queries * sum(lengths))
        total = 0
        for length in lengths:
            offset = length - self.queries if self.causal == "lower_right" else 0
            position = torch.arange(self.queries) + offset
            high = torch.full_like(position, length)
            low = torch.zeros_like(position)
            if self.causal is not None:
                high = torch.minimum(high, position + 1)
            if self.window is not None:
                low = torch.maximum(low, position - self.window[0])
                high = torch.minimum(high, position + self.window[1] + 1)
            total += int((high - low).clamp(min=0).sum())
        return float(self.heads * total)

    def flops(self, direction: str) -> float:
        """Floating-point operations of "forward", "backward", or one of the backward's two kernels."""
        return 2.0 * PRODUCTS[direction] * self.head_dim * self.pairs

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(self.tensors[name].numel() * self.tensors[name].element_size() for name in ("key", "value"))

    @property
    def band_mask(self) -> Tensor | None:
        """bool, broadcastable to the scores, for contenders that have no arguments for the band."""
        device = self.device
        position = torch.arange(self.queries, device=device)[:, None]
        j = torch.arange(self.keys, device=device)
        mask = None
        if self.key_lengths is not None:
            mask = j < torch.tensor(self.key_lengths, device=device)[:, None, None, None]
        if self.causal == "lower_right":
            position = position + self.keys - self.queries
        if self.causal is not None:
            causal = j <= position
            mask = causal if mask is None else mask & causal
        if self.window is not None:
            inside = (j >= position - self.window[0]) & (j <= position + self.window[1])
            mask = inside if mask is None else mask & inside
        return mask

    def arguments(self) -> dict:
        """Keyword arguments for fastattn."""
        return {
            "attn_mask": self.tensors.get("mask", self.tensors.get("bias")),
            "dropout_p": DROPOUT if self.variant == "dropout" else 0.0,
            "causal": self.causal,
            "window": self.window,
            "key_lengths": None if self.key_lengths is None else torch.tensor(self.key_lengths, device=self.device),
            "enable_gqa": self.heads != self.kv_heads,
        }


Forward = Callable[[], Tensor]


def fastattn_default(setup: Setup) -> Forward:
    """fastattn as a user calls it, on the backend named by the set-up."""
    import fastattn

    q, k, v = (setup.tensors[name] for name in ("query", "key", "value"))
    arguments = setup.arguments()
    return lambda: fastattn.scaled_dot_product_attention(q, k, v, backend=setup.backend, **arguments)


#: What a contender of ours finds in its environment, forward and backward.
ENVIRONMENT = {"fastattn_unordered": ("FASTATTN_HOPPER_UNORDERED", "1"), "fastattn_plain": ("FASTATTN_HOPPER", "0")}


def in_environment(contender: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call as the contender makes it."""
    if contender not in ENVIRONMENT:
        return call

    def with_variable():
        with environment(*ENVIRONMENT[contender]):
            return call()

    return with_variable


def fastattn_unordered(setup: Setup) -> Forward:
    """fastattn with the parts of dQ added in any order, as the peers' backward does; the forward is the same."""
    if setup.variant is not None or setup.dtype == "fp32":
        raise Unsupported("the unordered backward is timed on plain calls")
    if is_dead("hopper/fused_unordered/d128"):
        raise Unsupported("the unordered backward is dead")
    return in_environment("fastattn_unordered", fastattn_default(setup))


def fastattn_plain(setup: Setup) -> Forward:
    """fastattn without the Hopper kernels."""
    return in_environment("fastattn_plain", fastattn_default(setup))


def naive(setup: Setup) -> Forward:
    """Two matrix products and a softmax in the tensors' dtype."""
    size = setup.batch * setup.heads * setup.queries * setup.keys * DTYPES[setup.dtype].itemsize
    if size > NAIVE_LIMIT_BYTES:
        raise Unsupported(f"its scores take {size / 1e9:.0f} GB")
    q, k, v = (setup.tensors[name] for name in ("query", "key", "value"))
    scale = setup.head_dim**-0.5
    group = setup.heads // setup.kv_heads
    band, mask, bias = setup.band_mask, setup.tensors.get("mask"), setup.tensors.get("bias")
    forbidden = None if band is None and mask is None else ~(band if mask is None else mask)

    def forward() -> Tensor:
        key, value = (k, v) if group == 1 else (t.repeat_interleave(group, 1) for t in (k, v))
        scores = (q @ key.mT) * scale
        if bias is not None:
            scores = scores + bias
        if forbidden is not None:
            scores = scores.masked_fill(forbidden, -torch.inf)
        weights = scores.softmax(-1)
        if setup.variant == "dropout":
            weights = F.dropout(weights, DROPOUT)
        return weights @ value

    return forward


def _torch_sdpa(name: str) -> Callable[[Setup], Forward]:
    def build(setup: Setup) -> Forward:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, name)
        q, k, v = (setup.tensors[name] for name in ("query", "key", "value"))
        # torch's is_causal needs no mask; all else that is not a plain call does.
        is_causal = setup.causal == "upper_left" and setup.window is None and setup.key_lengths is None
        mask = setup.tensors.get("mask", setup.tensors.get("bias"))
        if mask is None and not is_causal:
            mask = setup.band_mask
        if mask is not None:
            mask = mask.expand(setup.batch, setup.heads, setup.queries, setup.keys)
        dropout = DROPOUT if setup.variant == "dropout" else 0.0

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, mask, dropout, is_causal, enable_gqa=setup.heads != setup.kv_heads
                )

        return _refusing(forward)

    return build


def flex(setup: Setup) -> Forward:
    """FlexAttention, compiled for the shape; its block mask is made outside the timed call."""
    if setup.variant in ("dropout", "mask", "mask_heads"):
        raise Unsupported(f"{setup.variant}: not expressible without materialising it per call")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q, k, v = (setup.tensors[name] for name in ("query", "key", "value"))
    offset = setup.keys - setup.queries if setup.causal == "lower_right" else 0
    causal, window, bias = setup.causal is not None, setup.window, setup.tensors.get("bias")
    lengths = None if setup.key_lengths is None else torch.tensor(setup.key_lengths, device=setup.device)

    def allowed(b, h, i, j):
        result = j >= 0
        if causal:
            result = result & (j <= i + offset)
        if window is not None:
            result = result & (j >= i + offset - window[0]) & (j <= i + offset + window[1])
        if lengths is not None:
            result = result & (j < lengths[b])
        return result

    def add_bias(score, b, h, i, j):
        return score + bias[0, h, i, j]

    block_mask = None
    if causal or window is not None or lengths is not None:
        batch = setup.batch if lengths is not None else None
        block_mask = create_block_mask(allowed, batch, None, setup.queries, setup.keys, device=setup.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    score_mod = None if bias is None else add_bias
    gqa = setup.heads != setup.kv_heads
    return lambda: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa)


def _refusing(forward: Forward) -> Forward:
    """Torch's "no available kernel" becomes Unsupported."""

    def call() -> Tensor:
        try:
            return forward()
        except RuntimeError as error:
            if any(text in str(error) for text in ("No available kernel", "No viable backend", "not support")):
                raise Unsupported(str(error).splitlines()[0]) from None
            raise

    return call


CONTENDERS: dict[str, Callable[[Setup], Forward]] = {
    "fastattn": fastattn_default,
    "fastattn_unordered": fastattn_unordered,
    "fastattn_plain": fastattn_plain,
    "naive": naive,
    "flash": _torch_sdpa("FLASH_ATTENTION"),
    "cudnn": _torch_sdpa("CUDNN_ATTENTION"),
    "efficient": _torch_sdpa("EFFICIENT_ATTENTION"),
    "math": _torch_sdpa("MATH"),
    "flex": flex,
}
OURS = ("fastattn", "fastattn_unordered", "fastattn_plain")
