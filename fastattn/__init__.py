"""Fused scaled dot-product attention for PyTorch."""

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
