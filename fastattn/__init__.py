"""Fused scaled dot-product attention for PyTorch."""
