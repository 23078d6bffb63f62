"""Problems for the Hopper kernels, and the definition of attention that they are held to."""

import contextlib
import inspect
import math
from pathlib import Path
from unittest import mock

import torch

from fastattn import kernels
from fastattn.problem import Problem
from gluon_emulator import Descriptor, Pointer

KERNELS = Path(kernels.__file__).parent / "hopper"


def make_case(
    B=1,
    H=2,
    group=1,
    Lq=128,
    Lk=128,
    D=64,
    dtype=torch.bfloat16,
    causal=None,
    window=(None, None),
    lengths=None,
    transposed=False,
    seed=0,
):
    """A random problem; ``transposed`` lays tensors out [B, L, H, D] as a packed projection does.

    Keys and values that no query sees hold NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads, length):
        if transposed:
            return torch.randn(B, length, heads, D, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(B, heads, length, D, generator=generator).to(dtype)

    problem = Problem(
        query=tensor(H, Lq),
        key=tensor(H // group, Lk),
        value=tensor(H // group, Lk),
        scale=1 / math.sqrt(D),
        causal=causal,
        window_left=window[0],
        window_right=window[1],
        key_lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
    )
    if causal or lengths or window != (None, None):
        for rows in (problem.key, problem.value):
            rows.masked_fill_(hidden(problem), math.nan)
    return problem


def allowed(problem) -> torch.Tensor:
    """bool [B, 1, Lq, Lk]: the band, key by key, from its definition in :class:`Problem`."""
    B, _, Lq, _ = problem.query.shape
    Lk = problem.key.shape[2]
    n = torch.full((B,), Lk) if problem.key_lengths is None else problem.key_lengths
    n = n.view(B, 1, 1, 1)
    query, key = torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk).view(1, 1, 1, Lk)
    position = query + (n - Lq if problem.causal == "lower_right" else 0)
    seen = (key < n).expand(B, 1, Lq, Lk)
    if problem.causal:
        seen = seen & (key <= position)
    if problem.window_left is not None:
        seen = seen & (key >= position - problem.window_left)
    if problem.window_right is not None:
        seen = seen & (key <= position + problem.window_right)
    return seen


def hidden(problem) -> torch.Tensor:
    """bool [B, 1, Lk, 1]: the keys that no query sees."""
    return ~allowed(problem).any(2)[..., None]


def definition(problem, query=None, key=None, value=None):
    """(out, lse) in fp64, term by term; pass fp64 leaves to differentiate through it.

    Keys that no query sees are replaced by zeros, so that what they hold cannot matter.
    """
    query = problem.query.double() if query is None else query
    key = problem.key.double() if key is None else key
    value = problem.value.double() if value is None else value
    seen = allowed(problem)
    key, value = (torch.where(hidden(problem), 0.0, rows) for rows in (key, value))
    key = key.repeat_interleave(problem.group_size, 1)
    value = value.repeat_interleave(problem.group_size, 1)
    scores = (query @ key.mT * problem.scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen, (scores - lse[..., None]).exp(), 0.0)
    return weights @ value, lse


class EmulatedKernel:
    """Stands for a kernel in a module that launches it: ``kernel[grid](...)`` runs it on the emulator."""

    def __init__(self, kernels, name: str, seed: int, together: bool):
        self.kernels, self.name, self.seed, self.together = kernels, name, seed, together

    def __getitem__(self, grid):
        signature = inspect.signature(self.kernels.functions[self.name])

        def launch(*arguments, **named):
            named = {name: value for name, value in named.items() if name in signature.parameters}
            bound = signature.bind(*arguments, **named).arguments
            emulated = {name: self.on_emulator(value) for name, value in bound.items()}
            self.kernels.launch(self.name, *grid, emulated, self.seed, together=self.together)

        return launch

    @staticmethod
    def on_emulator(argument):
        if isinstance(argument, torch.Tensor):
            return Pointer(argument)
        return Descriptor(argument.base, argument.block_shape) if hasattr(argument, "block_shape") else argument


@contextlib.contextmanager
def emulated(module, kernels, names, seed: int, programs: int, together: bool = False):
    """Run ``names``, the kernels that a launching module calls, on the emulator, as if on ``programs`` processors."""
    stand_ins = {name: EmulatedKernel(kernels, name, seed, together) for name in names}
    with mock.patch.multiple(module, multiprocessors=lambda device: programs, **stand_ins):
        yield
