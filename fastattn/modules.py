"""Multi-head attention modules: :class:`MultiHeadAttention`, the drop-in one, and :class:`SelfAttention`."""

from __future__ import annotations

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch.nn.utils.rnn import pad_sequence

from fastattn import dispatch, ops
from fastattn.checks import check_dense, check_dropout, check_flag, check_module_sizes, shown
from fastattn.functional import draw_rng_state_for, scaled_dot_product_attention
from fastattn.integrations import scripting
from fastattn.integrations.symbolic import LeafModule
from fastattn.masks import combine_masks
from fastattn.problem import Arguments
from fastattn.subclasses import check_no_rules, is_causal_bias, materialized


def _do_nothing(module: nn.Module, arguments: tuple[()]) -> None:
    """A hook."""


class FusedPathGuard(nn.Module):
    """A submodule that keeps the fused evaluation path of nn.TransformerEncoderLayer closed.

    That path calls none of the layer's submodules, so torch does not take it where one has a hook. This one has,
    and as it is never called, its hook costs nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_do_nothing)

    def forward(self) -> None:
        """Nothing."""


class MultiHeadAttention(LeafModule, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` (Vaswani et al., arXiv:1706.03762) on the fused path.

    Takes the same constructor arguments, the same calls and the same state dict, and differs so:

    - The output is always computed by the fused kernels, in training and in evaluation alike.
      ``need_weights=True`` adds a second pass that recomputes the weights from the saved log-sum-exp,
      averaging over the heads as it goes. Gradients through the weights are computed densely.
    - A query that may attend to nothing (a sample that is all padding) yields 0 before the output
      projection, weights 0 and finite gradients, where torch yields NaN.
    - ``is_causal=True`` is applied, alone or together with ``attn_mask``, rather than taken as a hint.
    - ``attn_mask`` may also be 4-D, broadcastable to [N, num_heads, L, S].
    - Nested tensors are taken in training too, and with gradients.

    True in a bool ``attn_mask`` or ``key_padding_mask`` means that the position is masked out, as in
    ``nn.MultiheadAttention``. To :func:`fastattn.scaled_dot_product_attention` it means the opposite, attend, as in
    torch's function.

    ``backend`` is "auto", "cpu", "triton", "torch" or "reference". Errors are TypeError or ValueError and name
    the argument, what was given and what would be right.

    Being an ``nn.MultiheadAttention``, it can stand in an ``nn.TransformerEncoderLayer``. That layer's
    fused evaluation path reads the weights and would bypass this module; its submodule
    ``fused_path_guard`` keeps the path closed, and in TorchScript, which sees no hooks, the flag that the
    path asks for.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_module_sizes(embed_dim, num_heads, dropout)
        _check_feature_size("kdim", kdim)
        _check_feature_size("vdim", vdim)
        dispatch.check_backend_name(backend)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.backend = backend
        self.fused_path_guard = FusedPathGuard()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Are the weights packed into one? A script is told no: torch's fused path, which asks, stays closed."""
        if torch.jit.is_scripting():
            return False
        return self.kdim == self.embed_dim and self.vdim == self.embed_dim

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        """Nothing: it follows from the sizes."""

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        vars(self).pop("_qkv_same_embed_dim", None)  # of modules that were pickled before it was a property
        if "fused_path_guard" not in self._modules:
            self.fused_path_guard = FusedPathGuard()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``.

        Args:
            query: [L, N, embed_dim], with ``batch_first`` [N, L, embed_dim], or unbatched [L, embed_dim].
                For self-attention with ``batch_first`` also a nested tensor of sequences [L, embed_dim], of
                layout torch.strided and without masks; the output is nested then, the weights are padded by 0.
            key: [S, N, kdim], [N, S, kdim] or [S, kdim].
            value: [S, N, vdim], [N, S, vdim] or [S, vdim].
            key_padding_mask: [N, S] or unbatched [S]; bool, True = padding, or float, added to the scores.
            need_weights: also return the attention weights, after dropout.
            attn_mask: [L, S], [N * num_heads, L, S] or broadcastable to [N, num_heads, L, S]; bool,
                True = masked out, or float, added to the scores and differentiable.
            average_attn_weights: average the weights over the heads.
            is_causal: query i attends to keys up to i only.

        Returns:
            The output in query's shape, and the weights [N, L, S] (not averaged [N, num_heads, L, S];
            unbatched without N), or None.
        """
        if torch.jit.is_scripting():
            return self._forward_of_script(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return self._forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _forward_of_script(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        merged, weights = scripting.multi_head_attention(
            query,
            key,
            value,
            self.num_heads,
            self.batch_first,
            self.in_proj_weight,
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight),
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            float(self.dropout) if self.training else 0.0,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            self.backend,
        )
        return self.out_proj(merged), weights

    @torch.jit.unused
    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if _get_tracing_state() is not None:  # the tracer of ONNX makes tensors of the default flags
            need_weights, average_attn_weights, is_causal = (
                bool(flag) if isinstance(flag, Tensor) and flag.dim() == 0 else flag
                for flag in (need_weights, average_attn_weights, is_causal)
            )
        if is_causal_bias(attn_mask):
            attn_mask = ~materialized(attn_mask, getattr(query, "device", None))
        check_flag("is_causal", is_causal)
        for name, flag in (("need_weights", need_weights), ("average_attn_weights", average_attn_weights)):
            if isinstance(flag, Tensor):  # a mask in the place of another argument
                raise TypeError(f"{name} must be a bool, got {shown(flag)}")
        if isinstance(query, Tensor) and query.is_nested:
            sequences = self._check_nested(query, key, value, key_padding_mask, attn_mask)
            return self._forward_nested(sequences, need_weights, average_attn_weights, is_causal)
        self._check(query, key, value, key_padding_mask, attn_mask)
        is_batched = query.dim() == 3
        query, key, value = self._project(query, key, value, is_batched)
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        extra_keys = (self.bias_k is not None) + self.add_zero_attn
        masks = combine_masks(query, key.shape[2] - extra_keys, attn_mask, key_padding_mask, is_causal, extra_keys)
        dropout_p = check_dropout(self.dropout, "dropout") if self.training else 0.0
        if not need_weights and masks.attn_mask is None and masks.bias is None:
            is_causal = masks.causal is not None
            options = {"key_lengths": masks.key_lengths, "backend": self.backend}
            heads = scaled_dot_product_attention(query, key, value, None, dropout_p, is_causal, **options)
            return self.out_proj(self._merge_heads(heads, is_batched)), None
        arguments = Arguments(
            query,
            key,
            value,
            masks.attn_mask,
            masks.bias,
            masks.key_lengths,
            scale=None,
            causal=masks.causal,
            window_left=None,
            window_right=None,
            dropout_p=dropout_p,
        )
        rng_state = draw_rng_state_for(arguments)
        if not need_weights:
            heads = ops.attention_output(*arguments, rng_state, self.backend)
            return self.out_proj(self._merge_heads(heads, is_batched)), None
        heads, lse = ops.attention_forward(*arguments, rng_state, self.backend)
        weights = ops.attention_weights(lse.detach(), average_attn_weights, *arguments, rng_state, self.backend)
        weights = weights.to(heads.dtype)
        weights = weights if is_batched else weights.squeeze(0)
        return self.out_proj(self._merge_heads(heads, is_batched)), weights

    def _forward_nested(
        self, sequences: tuple[Tensor, ...], need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of each of the sequences [length, E], which are a nested tensor's; nested too."""
        lengths = [sequence.shape[0] for sequence in sequences]
        is_ragged = len(set(lengths)) > 1
        device = sequences[0].device
        has_extra_keys = self.bias_k is not None or self.add_zero_attn
        if need_weights or not is_ragged or device.type != "cpu" or has_extra_keys:
            padded, padding = pad_sequence(sequences, batch_first=True), None
            if is_ragged:
                positions = torch.arange(padded.shape[1], device=device)
                padding = positions >= torch.tensor(lengths, device=device)[:, None]
            out, weights = MultiHeadAttention.forward(
                self, padded, padded, padded, padding, need_weights, None, average_attn_weights, is_causal
            )
            if weights is not None and is_ragged:
                rows = padding if average_attn_weights else padding[:, None]
                weights = weights.masked_fill(rows[..., None], 0.0)
            outputs = [sequence[:length] for sequence, length in zip(out, lengths, strict=True)]
            return torch.nested.as_nested_tensor(outputs), weights
        # A call for each sequence: on a CPU it costs less than the queries that are padding.
        packed = F.linear(torch.cat(sequences), self.in_proj_weight, self.in_proj_bias)  # [T, 3 * E]
        heads = packed.unflatten(-1, (3, 1, self.num_heads, self.head_dim)).permute(1, 2, 3, 0, 4)
        dropout_p = check_dropout(self.dropout, "dropout") if self.training else 0.0
        outputs = [
            scaled_dot_product_attention(*projected, None, dropout_p, is_causal, backend=self.backend).transpose(1, 2)
            for projected in zip(*(tensor.split(lengths, dim=2) for tensor in heads), strict=True)
        ]
        merged = torch.cat(outputs, dim=1)[0].flatten(1)  # [T, E]
        return torch.nested.as_nested_tensor(list(self.out_proj(merged).split(lengths))), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H, L, D], [N, H, S, D], [N, H, S, D]: strided views of as few matrix products as possible."""
        size = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            query, key, value = _split_last(F.linear(query, weight, bias), 3, size).unbind(-2)
        elif weight is not None and key is value:
            query_bias, pair_bias = (None, None) if bias is None else (bias[:size], bias[size:])
            query = F.linear(query, weight[:size], query_bias)
            key, value = _split_last(F.linear(key, weight[size:], pair_bias), 2, size).unbind(-2)
        else:
            if weight is not None:
                weights = weight.chunk(3)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            query, key, value = map(F.linear, (query, key, value), weights, biases)
        if not is_batched:
            query, key, value = (tensor.unsqueeze(self._batch_dim) for tensor in (query, key, value))
        key, value = self._append_extra_keys(key, value)
        return self._split_heads(query), self._split_heads(key), self._split_heads(value)

    @property
    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    def _append_extra_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The learned key and value of ``add_bias_kv`` and the zero ones of ``add_zero_attn``."""
        if self.bias_k is None and not self.add_zero_attn:
            return key, value
        keys, values = [key], [value]
        shape = list(key.shape)
        shape[1 - self._batch_dim] = 1
        if self.bias_k is not None:
            keys.append(self.bias_k.to(key.dtype).expand(shape))
            values.append(self.bias_v.to(value.dtype).expand(shape))
        if self.add_zero_attn:
            keys.append(key.new_zeros(shape))
            values.append(value.new_zeros(shape))
        return torch.cat(keys, 1 - self._batch_dim), torch.cat(values, 1 - self._batch_dim)

    def _split_heads(self, projected: Tensor) -> Tensor:
        """[N, L, E], or [L, N, E] without batch_first -> a view [N, H, L, D]."""
        heads = _split_last(projected, self.num_heads, self.head_dim)
        return heads.permute(0, 2, 1, 3) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _merge_heads(self, heads: Tensor, is_batched: bool) -> Tensor:
        """The reverse; a view, because the output lies in memory as the query does."""
        heads = heads.permute(0, 2, 1, 3) if self.batch_first else heads.permute(2, 0, 1, 3)
        merged = heads.flatten(2)
        return merged if is_batched else merged.squeeze(self._batch_dim)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        """Raise TypeError or ValueError for inputs that do not fit the module or one another."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        rank = query.dim()
        if rank not in (2, 3):
            raise ValueError(f"query must be 3-D, or 2-D where it is unbatched, got shape {list(query.shape)}")
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), tensor in zip(sizes.items(), (query, key, value), strict=True):
            check_dense(name, tensor)
            if tensor.dim() != rank:
                raise ValueError(f"{name} must be {rank}-D like query, got shape {list(tensor.shape)}")
            if tensor.shape[-1] != size:
                raise ValueError(f"{name} must have last size {size}, got shape {list(tensor.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have key's length and batch {list(key.shape[:-1])}, got {list(value.shape[:-1])}"
            )
        length_dim = 1 if rank == 3 and self.batch_first else 0
        batch = 1 if rank == 2 else query.shape[self._batch_dim]
        queries, keys = query.shape[length_dim], key.shape[length_dim]
        if rank == 3 and key.shape[self._batch_dim] != batch:
            raise ValueError(
                f"key must have query's batch size {batch} in dimension {self._batch_dim} "
                f"(batch_first={self.batch_first}), got shape {list(key.shape)}"
            )
        if key_padding_mask is not None:
            _check_mask_type("key_padding_mask", key_padding_mask, query)
            expected = [keys] if rank == 2 else [batch, keys]
            if list(key_padding_mask.shape) != expected:
                raise ValueError(f"key_padding_mask must have shape {expected}, got {list(key_padding_mask.shape)}")
        if attn_mask is not None:
            _check_mask_type("attn_mask", attn_mask, query)
            self._check_attn_mask_shape(attn_mask, batch, queries, keys)

    def _check_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The same where query is a nested tensor: its sequences."""
        if key is not query or value is not query:
            raise TypeError("key and value must be query itself where it is a nested tensor: it is for self-attention")
        if query.layout is not torch.strided:
            raise TypeError(f"query must be a nested tensor of layout torch.strided, got {query.layout}")
        if not self.batch_first:
            raise ValueError("query must be dense where batch_first is False, got a nested tensor")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                raise ValueError(f"{name} must be None where query is a nested tensor, got {shown(mask)}")
        sequences = query.unbind()
        shapes = [list(sequence.shape) for sequence in sequences]
        if not shapes or any(len(shape) != 2 or shape[1] != self.embed_dim for shape in shapes):
            raise ValueError(f"query must be nested of sequences [length, {self.embed_dim}], got those of {shapes}")
        return sequences

    def _check_attn_mask_shape(self, attn_mask: Tensor, batch: int, queries: int, keys: int) -> None:
        full = (batch, self.num_heads, queries, keys)
        shape = tuple(attn_mask.shape)
        if (
            shape == (queries, keys)
            or shape == (batch * self.num_heads, queries, keys)
            or (len(shape) == 4 and all(size in (1, expected) for size, expected in zip(shape, full, strict=True)))
        ):
            return
        raise ValueError(
            f"attn_mask must have shape {[queries, keys]}, {[batch * self.num_heads, queries, keys]} or one that "
            f"broadcasts to {list(full)}, got {list(shape)}"
        )


class SelfAttention(MultiHeadAttention):
    """Multi-head attention of a sequence over itself, [N, L, embed_dim] to the same, batch first.

    The parameters, the state dict and the errors are those of :class:`MultiHeadAttention`, and so are the masks:
    True = masked out.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            batch_first=True,
            device=device,
            dtype=dtype,
            backend=backend,
        )

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention of ``x`` over itself.

        Args:
            x: [N, L, embed_dim] or unbatched [L, embed_dim].
            key_padding_mask: [N, L] or unbatched [L]; bool, True = padding, or float, added to the scores.
            attn_mask: [L, L], [N * num_heads, L, L] or broadcastable to [N, num_heads, L, L]; bool,
                True = masked out, or float, added to the scores and differentiable.
            is_causal: position i attends to positions up to i only.

        Returns:
            [N, L, embed_dim], or unbatched [L, embed_dim].
        """
        if torch.jit.is_scripting():
            return self._forward_of_script(x, x, x, key_padding_mask, False, attn_mask, True, is_causal)[0]
        return super().forward(
            x,
            x,
            x,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )[0]


def _split_last(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """[..., outer * inner] -> [..., outer, inner]."""
    if _get_tracing_state() is not None:  # torch.onnx.export would take the sizes of what is unflattened for constants
        return tensor.view(*tensor.shape[:-1], outer, inner)
    return tensor.unflatten(-1, (outer, inner))


def _check_feature_size(name: str, size: int | None) -> None:
    if size is None:
        return
    if not isinstance(size, Integral) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int or None (embed_dim), got {shown(size)}")
    if size <= 0:
        raise ValueError(f"{name} must be positive or None (embed_dim), got {shown(size)}")


def _check_mask_type(name: str, mask: Tensor, query: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    check_dense(name, mask)
    check_no_rules(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = masked out) or float (added), got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {mask.device}")
