"""torch.distributed.tensor: how the operators compute on DTensors.

Batch and heads are independent, so tensors that are sharded over them pass through as they are: each rank computes its
own sequences and heads. Key and value heads are sharded with the query heads that read them. What is sharded
otherwise, over the sequence for instance, is redistributed first, as DTensor does for operators of its own.
"""

from __future__ import annotations

import math
from itertools import chain, combinations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_BATCH, _HEADS = 0, 1


def _input_placement(name: str, tensor, dim: int) -> Placement:
    """Of an argument whose call is sharded over ``dim``, batch or heads."""
    has_dim = dim == _BATCH if name == "key_lengths" else len(tensor.shape) > 2
    return Shard(dim) if has_dim and tensor.shape[dim] != 1 else Replicate()


def _output_placement(tensor: torch.Tensor, dim: int) -> Placement:
    """Of a result, in which each rank has either its own part or, where that part has been summed, a term."""
    if tensor.dim() < 3:  # the empty place of one that is not needed
        return Replicate()
    return Partial() if tensor.shape[dim] == 1 else Shard(dim)


def _divides(key_heads: int, mesh) -> bool:
    """Is a rank's part of the key heads whole, whichever dimensions of the mesh they are sharded over?"""
    sizes = [mesh.size(dim) for dim in range(mesh.ndim)]
    over = chain.from_iterable(combinations(sizes, count) for count in range(1, len(sizes) + 1))
    return all(key_heads % ranks == 0 for ranks in map(math.prod, over) if ranks <= key_heads)


def _results(operator: torch._ops.OpOverload, arguments: tuple, device: str) -> tuple[torch.Tensor, ...]:
    """The shapes of the results."""
    with FakeTensorMode():
        results = operator(
            *(
                torch.empty(argument.shape, dtype=argument.tensor_meta.dtype, device=device)
                if hasattr(argument, "tensor_meta")
                else argument
                for argument in arguments
            )
        )
    return (results,) if isinstance(results, torch.Tensor) else results


def _shardings(operator: torch._ops.OpOverload, arguments: tuple) -> list[tuple[list, list]]:
    """The placements of results and arguments that need no communication, over one dimension of the mesh."""
    names = [argument.name for argument in operator._schema.arguments]
    call = dict(zip(names, arguments, strict=True))
    mesh = call["query"].mesh
    results = _results(operator, arguments, mesh.device_type)
    tensors = {name: value for name, value in call.items() if hasattr(value, "tensor_meta")}

    def placements(dim: int | None) -> tuple[list, list]:
        if dim is None:
            given = {name: Replicate() for name in tensors}
            return [Replicate() for _ in results], [given.get(name) for name in names]
        given = {name: _input_placement(name, tensor, dim) for name, tensor in tensors.items()}
        # A query of one sequence or head is that of every rank.
        is_whole = call["query"].shape[dim] == 1
        made = [Replicate() if is_whole else _output_placement(result, dim) for result in results]
        return made, [given.get(name) for name in names]

    heads, key_heads = call["query"].shape[1], call["key"].shape[1]
    found = [placements(None), placements(_BATCH)]
    splits_heads = key_heads == heads or _divides(key_heads, mesh)
    if splits_heads and key_heads == call["value"].shape[1] and not call.get("average", False):
        found.append(placements(_HEADS))
    return found


def _register(operator: torch._ops.OpOverload) -> None:
    @register_sharding(operator)
    def shardings(*arguments):
        return _shardings(operator, arguments)

    # What is not a tensor decides about the results too, so all of it belongs to the key of DTensor's cache.
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[operator].static_argnum = 0


for _operator in ("attention_forward", "attention_backward", "attention_weights"):
    _register(getattr(torch.ops.fastattn, _operator).default)
