"""The calls that are timed, as data, and how fastattn and its peers run them.

A workload knows its size in useful FLOPs; its ``make()`` gives the inputs, which offer
``call(implementation)`` and ``check()``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks import flex_peer, onnx_peer
from fastattn.problem import Problem, make_problem
from fastattn.testing import Results, assert_within_budget, judge, run_reference

#: The longest sequence of which a whole head is compared with the float64 reference.
LONGEST_CHECKED_HEAD = 4096
#: Queries compared beyond it; they see all keys, so that the memory stays small.
CHECKED_QUERIES = 256
#: A peer has to compute the same thing, not as closely: its errors may be so many times what fastattn's may be.
PEER_BUDGET = 4.0


@dataclass(frozen=True)
class Workload:
    """One attention call: sizes, dtype, ingredients, forward or forward and backward.

    ``mask`` is None, "bool" ([B, 1, L, L], keeps 70 %), "triangle" (bool [1, 1, L, L], a causal mask as a tensor),
    "bias" ([1, H, L, L], added to the scores) or "bias_grad" (the same with its gradient). ``documents`` are
    lengths of documents that are packed into the sequence one after the other; each attends to itself, by a
    bool mask [1, 1, L, L]. ``keep`` is the share of the keys that key padding leaves, the same for every
    sequence, and ``keys`` the number of keys where it is not ``length``.
    """

    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    causal: bool = False
    keys: int | None = None
    kv_heads: int | None = None
    mask: str | None = None
    documents: tuple[int, ...] | None = None
    keep: float | None = None
    window: int | None = None
    dropout: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.batch},{self.heads},{self.length},{self.head_dim}"]
        if self.keys is not None:
            parts.append(f"keys={self.keys}")
        if self.kv_heads is not None:
            parts.append(f"kv_heads={self.kv_heads}")
        parts.append(str(self.dtype).removeprefix("torch."))
        parts.append("forward+backward" if self.backward else "forward")
        if self.causal:
            parts.append("causal")
        if self.mask is not None:
            parts.append(self.mask)
        if self.documents is not None:
            parts.append(f"{len(self.documents)} packed documents")
        if self.keep is not None:
            parts.append(f"padding keeps {self.keep:.0%}")
        if self.window is not None:
            parts.append(f"window={self.window}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return " ".join(parts)

    @property
    def key_count(self) -> int:
        return self.length if self.keys is None else self.keys

    @property
    def flops(self) -> float:
        """Useful work: 4 B H Lq Lk D forward, half of it causal, 3.5 times that with the backward pass.

        Counts keys that padding, the window or the documents leave; other masks and dropout leave it as it is.
        """
        keys = self.key_count * (self.keep or 1.0)
        if self.window is not None:
            keys = min(keys, 2 * self.window + 1)
        if self.documents is not None:
            keys = sum(length**2 for length in self.documents) / self.length
        forward = 4.0 * self.batch * self.heads * self.length * keys * self.head_dim
        halved = self.causal or self.mask == "triangle"
        return forward * (0.5 if halved else 1.0) * (3.5 if self.backward else 1.0)

    @property
    def key_value_bytes(self) -> int:
        """Bytes of the keys and values, which decoding reads once."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        return 2 * self.batch * kv_heads * self.key_count * self.head_dim * self.dtype.itemsize

    def make(self) -> Inputs:
        return Inputs(self)

    def fields(self) -> dict:
        """The fields as JSON can hold them."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def plain(self) -> Workload:
        """The same sizes without padding, masks, documents, window, dropout and shared heads."""
        return replace(self, mask=None, documents=None, keep=None, window=None, dropout=0.0, kv_heads=None)


class Inputs:
    """A workload's tensors, and the call itself by each implementation."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(workload.dtype)

        batch, heads, length, keys = workload.batch, workload.heads, workload.length, workload.key_count
        kv_heads = heads if workload.kv_heads is None else workload.kv_heads
        self.query = normal(batch, heads, length, workload.head_dim)
        self.key = normal(batch, kv_heads, keys, workload.head_dim)
        self.value = normal(batch, kv_heads, keys, workload.head_dim)
        self.grad_out = normal(batch, heads, length, workload.head_dim) if workload.backward else None
        self.attn_mask = self.key_lengths = self.document_of = None
        if workload.documents is not None:
            self.document_of = torch.arange(len(workload.documents)).repeat_interleave(torch.tensor(workload.documents))
            self.attn_mask = (self.document_of[:, None] == self.document_of)[None, None]
        elif workload.mask == "bool":
            self.attn_mask = torch.rand((batch, 1, length, keys), generator=generator) < 0.7
        elif workload.mask == "triangle":
            self.attn_mask = torch.ones(length, keys, dtype=torch.bool).tril()[None, None]
        elif workload.mask in ("bias", "bias_grad"):
            self.attn_mask = normal(1, heads, length, keys)
        if workload.keep is not None:
            self.key_lengths = torch.full((batch,), round(workload.keep * keys))
        # What others take for padding and window: one bool mask, made beforehand.
        self.dense_mask = self.attn_mask if self.attn_mask is not None else self._restriction()
        self.leaves = [self.query, self.key, self.value]
        if workload.mask == "bias_grad":
            self.leaves.append(self.attn_mask)
        if workload.backward:
            for leaf in self.leaves:
                leaf.requires_grad_()

    def call(self, implementation: str) -> Callable[[], object]:
        """A function without arguments: one call, gradients included.

        ``implementation`` is "naive", "torch", "fastattn", "loop" (of plain calls of fastattn, one for each document)
        or, forward only, "flex" and, for plain float32, "onnxruntime".

        Raises LeftOutError where this machine lacks what an implementation needs.
        """
        if implementation == "onnxruntime":
            return onnx_peer.attention(self.query, self.key, self.value, self.workload.causal)
        if implementation == "flex":
            return flex_peer.attention(self.query, self.key, self.value, **self.restrictions())
        forwards = {"naive": self._naive, "torch": self._torch, "fastattn": self._fastattn, "loop": self._loop}
        forward = forwards[implementation]
        if not self.workload.backward:
            return forward
        return lambda: torch.autograd.grad(forward(), self.leaves, self.grad_out)

    def restrictions(self) -> dict:
        """What a query may attend to, as FlexAttention's functions ask for it."""
        return {
            "is_causal": self.workload.causal,
            "window": self.workload.window,
            "key_lengths": self.key_lengths,
            "document_of": self.document_of,
            "attn_mask": self.attn_mask if self.document_of is None else None,
        }

    def check(self, peers: Mapping[str, Callable[[], object]] | None = None) -> None:
        """Compare output and gradients with the float64 reference before anything is timed.

        fastattn's keep the error budget, those of the peers ``PEER_BUDGET`` times as much; naive attention, which
        repeats the reference's formula, is not compared. Dropout is off for fastattn, and no peer that drops is
        compared: the drops are the tests' business. Of a large problem one head of the last sequence is compared,
        of a very long one its first queries and their gradient.
        """
        workload = self.workload
        group = workload.heads // (workload.kv_heads or workload.heads)
        rows = max(workload.length, workload.head_dim)
        small = workload.batch * workload.heads * workload.key_count * rows <= 2**22
        heads = slice(None) if small else slice(-group, None)
        kv_heads = slice(None) if small else slice(-1, None)
        long = workload.length > LONGEST_CHECKED_HEAD
        queries = slice(0, CHECKED_QUERIES) if long else slice(None)
        last = slice(-1, None)

        mask = self.attn_mask
        if mask is not None:
            mask = mask[last, heads if mask.shape[1] > 1 else slice(None), queries].detach()
        problem = make_problem(
            self.query[last, heads, queries].detach(),
            self.key[last, kv_heads].detach(),
            self.value[last, kv_heads].detach(),
            attn_mask=mask,
            is_causal=workload.causal,
            enable_gqa=True,
            window=None if workload.window is None else (workload.window, workload.window),
            key_lengths=None if self.key_lengths is None else self.key_lengths[last],
        )
        grad_out = self.grad_out[last, heads, queries] if workload.backward else None
        exact = run_reference(problem, grad_out)
        if workload.dtype == torch.float16:
            # torch's float16 matmul takes minutes on a CPU: float32, rounded once, is a stricter measure.
            naive = run_reference(problem, grad_out, dtype=torch.float32)
            naive = {name: result.half() for name, result in naive.items()}
        else:
            naive = run_reference(problem, grad_out, dtype=None)

        def compared(results: Results) -> Results:
            """What is compared of them."""
            parts = dict.fromkeys(("out", "grad_query"), (last, heads, queries))
            parts |= {} if long else dict.fromkeys(("grad_key", "grad_value"), (last, kv_heads))
            return {name: results[name][part].detach() for name, part in parts.items() if name in results}

        out = self._fastattn(0.0)
        actual = {"out": out}
        if workload.backward:
            actual |= self._named(torch.autograd.grad(out, self.leaves[:3], self.grad_out))
        assert_within_budget(compared(actual), problem, exact, naive, grad_out)
        for name, call in (peers or {}).items():
            if name != "naive" and not workload.dropout:
                self._check_peer(name, compared(self._named(call())), problem, exact, naive, grad_out)

    @staticmethod
    def _named(results: Tensor | tuple[Tensor, ...]) -> Results:
        """What a call returns, by name."""
        if isinstance(results, Tensor):
            return {"out": results}
        return dict(zip(("grad_query", "grad_key", "grad_value"), results, strict=False))

    @staticmethod
    def _check_peer(
        peer: str, results: Results, problem: Problem, exact: Results, naive: Results, grad_out: Tensor | None
    ) -> None:
        for judged in judge(results, problem, exact, naive, grad_out):
            if not judged.error <= PEER_BUDGET * judged.budget:
                what = f"{peer} computes something else: {judged.name} is off by {judged.error:.3e}"
                raise AssertionError(f"{what}, {PEER_BUDGET * judged.budget:.3e} allowed")

    def _restriction(self) -> Tensor | None:
        """bool [B|1, 1, Lq|1, Lk], or None: key padding and window as torch takes them."""
        workload = self.workload
        position = torch.arange(workload.key_count)
        if workload.window is not None:
            distance = torch.arange(workload.length)[:, None] - position
            return (distance.abs() <= workload.window)[None, None]
        if self.key_lengths is not None:
            return (position < self.key_lengths[:, None])[:, None, None]
        return None

    def _naive(self) -> Tensor:
        """softmax(Q K^T / sqrt(D) + bias) V as anyone writes it first, with the score matrix in memory."""
        workload = self.workload
        key, value = self.key, self.value
        if workload.kv_heads is not None:
            group = workload.heads // workload.kv_heads
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = self.query @ key.transpose(-2, -1) * workload.head_dim**-0.5
        if workload.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if self.dense_mask is not None:
            if self.dense_mask.dtype == torch.bool:
                scores = scores.masked_fill(~self.dense_mask, -torch.inf)
            else:
                scores = scores + self.dense_mask
        return F.dropout(scores.softmax(dim=-1), workload.dropout) @ value

    def _torch(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=self.dense_mask,
            dropout_p=self.workload.dropout,
            is_causal=self.workload.causal,
            enable_gqa=self.workload.kv_heads is not None,
        )

    def _loop(self) -> Tensor:
        documents = zip(*(x.split(self.workload.documents, 2) for x in (self.query, self.key, self.value)), strict=True)
        return torch.cat([fastattn.scaled_dot_product_attention(*document) for document in documents], dim=2)

    def _fastattn(self, dropout: float | None = None) -> Tensor:
        window = self.workload.window
        return fastattn.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.workload.dropout if dropout is None else dropout,
            is_causal=self.workload.causal,
            enable_gqa=self.workload.kv_heads is not None,
            window=None if window is None else (window, window),
            key_lengths=self.key_lengths,
        )


@dataclass(frozen=True)
class ModuleWorkload:
    """Self-attention by a whole module: projections, heads and weights as nn.MultiheadAttention has them."""

    batch: int
    length: int
    embed_dim: int
    heads: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    need_weights: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        direction = "forward+backward" if self.backward else "forward"
        weights = " need_weights" if self.need_weights else ""
        return f"module({self.embed_dim},{self.heads}) {self.batch}x{self.length} {dtype} {direction}{weights}"

    @property
    def flops(self) -> float:
        """Four projections and the attention itself, forward; 3 and 3.5 times that with the backward pass."""
        projections = 8.0 * self.batch * self.length * self.embed_dim**2
        attention = 4.0 * self.batch * self.length**2 * self.embed_dim
        return 3.0 * projections + 3.5 * attention if self.backward else projections + attention

    def make(self) -> ModuleInputs:
        return ModuleInputs(self)

    def fields(self) -> dict:
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


class ModuleInputs:
    """The two modules, with the same parameters, and their input."""

    def __init__(self, workload: ModuleWorkload) -> None:
        self.workload = workload
        torch.manual_seed(0)
        arguments = {"batch_first": True, "dtype": workload.dtype}
        theirs = torch.nn.MultiheadAttention(workload.embed_dim, workload.heads, **arguments)
        ours = fastattn.MultiHeadAttention(workload.embed_dim, workload.heads, **arguments)
        ours.load_state_dict(theirs.state_dict())
        self.modules = {"torch": theirs, "fastattn": ours}
        for module in self.modules.values():
            module.train(workload.backward)
        shape = (workload.batch, workload.length, workload.embed_dim)
        self.input = torch.randn(shape, dtype=workload.dtype, requires_grad=workload.backward)
        self.grad_out = torch.randn(shape, dtype=workload.dtype)

    def call(self, implementation: str) -> Callable[[], object]:
        module, need_weights = self.modules[implementation], self.workload.need_weights
        leaves = [self.input, *module.parameters()]

        def forward() -> Tensor:
            return module(self.input, self.input, self.input, need_weights=need_weights)[0]

        def without_gradients() -> Tensor:
            with torch.no_grad():
                return forward()

        if not self.workload.backward:
            return without_gradients
        return lambda: torch.autograd.grad(forward(), leaves, self.grad_out)

    def check(self) -> None:
        """The two modules agree, outputs and all gradients, to the dtype's rounding."""
        ours, theirs = self.call("fastattn")(), self.call("torch")()
        torch.testing.assert_close(
            ours, theirs, rtol=0.0, atol=100 * torch.finfo(self.workload.dtype).eps * self._scale(theirs)
        )

    @staticmethod
    def _scale(results: Tensor | tuple[Tensor, ...]) -> float:
        results = results if isinstance(results, tuple) else (results,)
        return max(result.abs().max().item() for result in results)
