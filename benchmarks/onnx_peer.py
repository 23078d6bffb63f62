"""ONNX Runtime's MultiHeadAttention as a further peer, where onnx and onnxruntime are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.peers import LeftOutError


def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Callable[[], Tensor]:
    """A forward call on [B, H, L, D] float32 tensors, laid out as the operator wants them beforehand.

    The operator is com.microsoft.MultiHeadAttention of ONNX Runtime's contrib operators; what it returns,
    [B, L, H * D], is viewed as [B, H, L, D].

    Raises LeftOutError where onnx or onnxruntime is not installed.
    """
    missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise LeftOutError(f"{' and '.join(missing)} not installed")
    import onnxruntime

    heads = query.shape[1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads of its pool that spin would take a core from whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(_model(heads, is_causal), options, providers=["CPUExecutionProvider"])
    feeds = {
        name: tensor.detach().transpose(1, 2).flatten(2).contiguous().numpy()
        for name, tensor in (("query", query), ("key", key), ("value", value))
    }
    return lambda: torch.from_numpy(session.run(None, feeds)[0]).unflatten(-1, (heads, -1)).transpose(1, 2)


def _model(heads: int, is_causal: bool) -> bytes:
    from onnx import TensorProto, helper

    node = helper.make_node(
        "MultiHeadAttention",
        ["query", "key", "value"],
        ["out"],
        domain="com.microsoft",
        num_heads=heads,
        unidirectional=int(is_causal),
    )
    sizes = ["batch", "length", "width"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in ("query", "key", "value")]
    graph = helper.make_graph(
        [node], "attention", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, sizes)]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
