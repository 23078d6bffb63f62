"""Fused scaled dot-product attention for PyTorch."""

from fastattn import reference
from fastattn.functional import explain, scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = ["__version__", "explain", "reference", "scaled_dot_product_attention"]
