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

For users:

    scaled_dot_product_attention(query, key, value, ...)   the function; torch's arguments and more
    MultiHeadAttention, SelfAttention                      modules; the first takes nn.MultiheadAttention's place
    convert(model), unconvert(model)                       swap the attention modules of a model, and back
    explain(query, key, value, ...)                        which backend computes a call, and why not the others
    reference                                              attention in dense PyTorch, as every backend computes it

help() of each tells of arguments, results and errors, ``fastattn --help`` of the commands. Models that use it are in
``fastattn.models``.
"""

# No __all__: with it help(fastattn) shows all that the modules inherit from nn.Module, 2000 lines.
from fastattn import reference as reference
from fastattn.convert import convert as convert
from fastattn.convert import unconvert as unconvert
from fastattn.functional import explain as explain
from fastattn.functional import scaled_dot_product_attention as scaled_dot_product_attention
from fastattn.modules import MultiHeadAttention as MultiHeadAttention
from fastattn.modules import SelfAttention as SelfAttention

__version__ = "0.1.0"

_PUBLIC = (
    *("MultiHeadAttention", "SelfAttention", "convert", "explain", "reference"),
    *("scaled_dot_product_attention", "unconvert"),
)


def __dir__() -> list[str]:
    """What is for users: the modules that make it up are there too, but not for completion."""
    return sorted({*_PUBLIC, *(name for name in globals() if name.startswith("__"))})
