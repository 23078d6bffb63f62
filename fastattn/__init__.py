"""Fused scaled dot-product attention for PyTorch, on a CPU or a GPU, forward and backward.

    >>> import torch, fastattn
    >>> query, key, value = torch.randn(3, 2, 8, 100, 64, requires_grad=True)
    >>> out = fastattn.scaled_dot_product_attention(query, key, value, causal="lower_right", window=(31, 0))
    >>> out.sum().backward()
    >>> fastattn.explain(query, key, value).backend  # which engine computes, and why not the others
    'cpu'
    >>> layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
    >>> fastattn.convert(layer).swapped  # every nn.MultiheadAttention of a model, in place
    ['self_attn']

help(fastattn.scaled_dot_product_attention) and help(fastattn.convert) tell of arguments, results and errors, and
``fastattn --help`` of the commands. Models that use it are in ``fastattn.models``.
"""

from fastattn import reference
from fastattn.convert import convert, unconvert
from fastattn.functional import explain, scaled_dot_product_attention
from fastattn.modules import MultiHeadAttention, SelfAttention

__version__ = "0.1.0"

__all__ = [
    "MultiHeadAttention",
    "SelfAttention",
    "__version__",
    "convert",
    "explain",
    "reference",
    "scaled_dot_product_attention",
    "unconvert",
]


def __dir__() -> list[str]:
    """What is for users: the modules that make it up are there too, but not for completion."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
