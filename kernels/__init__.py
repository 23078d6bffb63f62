"""The GPU engine: Triton kernels, imported as ``fastattn.kernels``."""
