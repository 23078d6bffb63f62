"""Who fastattn is compared with, what the tables call them, and how one is left out."""

from __future__ import annotations

#: The peers by name, in the order of the tables' columns.
TITLES = {
    "torch": "torch",
    "naive": "naive",
    "onnxruntime": "ONNX Runtime",
    "flex": "FlexAttention",
    "loop": "a loop over the documents",
}


class LeftOutError(Exception):
    """A peer cannot run on this machine; the message says why."""
