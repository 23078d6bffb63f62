"""Wrong arguments: a TypeError or ValueError that names the argument, what was given, what is right."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import explain, scaled_dot_product_attention


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


GOOD = {"query": zeros(2, 4, 5, 8), "key": zeros(2, 4, 7, 8), "value": zeros(2, 4, 7, 8)}

NESTED = torch.nested.nested_tensor([zeros(4, 7, 8), zeros(4, 7, 8)])
JAGGED = torch.nested.nested_tensor([zeros(4, 7, 8), zeros(3, 7, 8)], layout=torch.jagged)

#: (what to change, the exception, words that the message holds)
BAD = [
    ({"query": [[0.0]]}, TypeError, ["query", "Tensor", "list"]),
    ({"value": None}, TypeError, ["value", "Tensor", "NoneType"]),
    ({"query": zeros(8)}, ValueError, ["query", "[8]", "head_dim"]),
    ({"query": zeros(2, 4, 5, 8, dtype=torch.int32)}, TypeError, ["query", "int32", "float32"]),
    ({"query": zeros(2, 4, 5, 8, dtype=torch.complex64)}, TypeError, ["query", "complex64", "bfloat16"]),
    ({"key": zeros(2, 4, 7, 8, dtype=torch.float16)}, TypeError, ["key", "float16", "float32"]),
    ({"value": zeros(2, 4, 7, 8, dtype=torch.float64)}, TypeError, ["value", "float64", "float32"]),
    ({"key": zeros(2, 4, 7, 8, device="meta")}, ValueError, ["key", "meta", "cpu"]),
    ({"query": zeros(2, 4, 5, 8).to_sparse()}, TypeError, ["query", "sparse_coo", "strided"]),
    ({"value": zeros(2, 4, 7, 8).to_mkldnn()}, TypeError, ["value", "mkldnn", "strided"]),
    (
        {"query": NESTED, "key": NESTED, "value": NESTED},
        TypeError,
        ["query", "nested", "to_padded_tensor", "key_lengths"],
    ),
    ({"value": NESTED}, TypeError, ["value", "nested", "strided"]),
    ({"key": JAGGED}, TypeError, ["key", "nested", "strided"]),
    ({"key": zeros(2, 4, 7, 6)}, ValueError, ["key", "head_dim 8", "[2, 4, 7, 6]"]),
    ({"value": zeros(2, 4, 6, 8)}, ValueError, ["value", "length 7", "[2, 4, 6, 8]"]),
    ({"query": zeros(2, 4, 5, 0)}, ValueError, ["key", "head_dim 0", "[2, 4, 7, 8]"]),
    ({"key": zeros(3, 4, 7, 8)}, ValueError, ["batch", "[2]", "[3]"]),
    ({"key": zeros(2, 3, 7, 8), "value": zeros(2, 3, 7, 8)}, ValueError, ["4 query heads", "3 key heads"]),
    ({"key": zeros(2, 2, 7, 8), "value": zeros(2, 2, 7, 8)}, ValueError, ["enable_gqa=True", "4 heads", "2"]),
    ({"value": zeros(2, 2, 7, 8)}, ValueError, ["value", "4 heads", "enable_gqa=True", "got 2"]),
    ({"value": zeros(2, 3, 7, 8), "enable_gqa": True}, ValueError, ["value", "4 heads", "divides", "got 3"]),
    ({"attn_mask": [[True]]}, TypeError, ["attn_mask", "Tensor", "list"]),
    ({"attn_mask": zeros(5, 7, dtype=torch.int64)}, TypeError, ["attn_mask", "bool", "int64"]),
    ({"attn_mask": zeros(5, 7, dtype=torch.float64)}, TypeError, ["attn_mask", "float32", "float64"]),
    ({"attn_mask": zeros(7, 5, dtype=torch.bool)}, ValueError, ["attn_mask", "[2, 4, 5, 7]", "[7, 5]"]),
    ({"attn_mask": zeros(3, 1, 5, 7)}, ValueError, ["attn_mask", "[2, 4, 5, 7]", "[3, 1, 5, 7]"]),
    ({"attn_mask": zeros(1, 2, 4, 5, 7)}, ValueError, ["attn_mask", "[2, 4, 5, 7]", "[1, 2, 4, 5, 7]"]),
    ({"attn_mask": zeros(5, 7, device="meta")}, ValueError, ["attn_mask", "cpu", "meta"]),
    ({"attn_mask": zeros(5, 7).to_sparse()}, TypeError, ["attn_mask", "sparse_coo", "strided"]),
    ({"attn_mask": zeros(5, 7).to_mkldnn()}, TypeError, ["attn_mask", "mkldnn", "strided"]),
    ({"attn_mask": NESTED}, TypeError, ["attn_mask", "nested", "strided"]),
    (
        {"query": zeros(2, 1, 5, 8), "key": zeros(2, 1, 7, 8), "value": zeros(2, 1, 7, 8), "attn_mask": zeros(2, 5, 7)},
        ValueError,
        ["attn_mask", "[2, 1, 5, 7]", "[2, 5, 7]"],
    ),
    ({"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan", "at most 1"]),
    ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5", "at most 1"]),
    ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1", "at least 0"]),
    ({"dropout_p": "0.1"}, TypeError, ["dropout_p", "'0.1'", "float"]),
    ({"dropout_p": torch.tensor([0.1, 0.2])}, TypeError, ["dropout_p", "a tensor of torch.float32", "float"]),
    ({"dropout_p": 10**5000}, ValueError, ["dropout_p", "an int of 16610 bits", "at most 1"]),
    ({"scale": float("nan")}, ValueError, ["scale", "nan", "finite"]),
    ({"scale": "1"}, TypeError, ["scale", "'1'", "float"]),
    ({"scale": 10**400}, ValueError, ["scale", "an int of 1329 bits", "finite"]),
    ({"scale": -(10**5000)}, ValueError, ["scale", "an int of 16610 bits", "finite"]),
    ({"scale": torch.tensor(0.5, requires_grad=True)}, TypeError, ["scale", "requires a gradient", "detach()"]),
    ({"scale": torch.tensor(True)}, TypeError, ["scale", "a tensor of torch.bool", "float"]),
    ({"scale": torch.tensor(float("inf"))}, ValueError, ["scale", "finite", "inf"]),
    ({"dropout_p": torch.tensor(0.5j)}, TypeError, ["dropout_p", "a tensor of torch.complex64", "float"]),
    ({"dropout_p": torch.tensor(1.5)}, ValueError, ["dropout_p", "at most 1", "1.5"]),
    ({"scale": torch.tensor([0.5, 0.5])}, TypeError, ["scale", "a tensor of torch.float32", "float"]),
    ({"is_causal": torch.tensor([True, False])}, TypeError, ["is_causal", "a tensor of torch.bool", "a bool"]),
    ({"is_causal": torch.tensor(1)}, TypeError, ["is_causal", "a tensor of torch.int64", "a bool"]),
    ({"is_causal": "no"}, TypeError, ["is_causal", "'no'", "a bool"]),
    ({"is_causal": None}, TypeError, ["is_causal", "None", "a bool"]),
    ({"enable_gqa": torch.tensor([True, False])}, TypeError, ["enable_gqa", "a tensor of torch.bool", "a bool"]),
    ({"enable_gqa": "no"}, TypeError, ["enable_gqa", "'no'", "a bool"]),
    ({"return_lse": torch.tensor([True, False])}, TypeError, ["return_lse", "a tensor of torch.bool", "a bool"]),
    ({"causal": "left"}, ValueError, ["causal", "'left'", "'upper_left'", "'lower_right'"]),
    ({"causal": True}, ValueError, ["causal", "True", "'upper_left'", "'lower_right'"]),
    ({"causal": "lower_right", "is_causal": True}, ValueError, ["is_causal", "'lower_right'", "upper_left"]),
    ({"window": 3}, TypeError, ["window", "(left, right)", "3"]),
    ({"window": (1, 2, 3)}, TypeError, ["window", "(left, right)", "(1, 2, 3)"]),
    ({"window": (-1, 0)}, ValueError, ["window", "left", "None", "-1"]),
    ({"window": (0, 1.5)}, TypeError, ["window", "right", "int", "1.5"]),
    ({"window": (torch.tensor(1), 0)}, TypeError, ["window", "left", "int", "a tensor of torch.int64"]),
    ({"window": torch.tensor([1, 2])}, TypeError, ["window", "(left, right)", "a tensor of torch.int64"]),
    ({"window": (0, -(10**5000))}, ValueError, ["window", "right", "at least 0", "an int of 16610 bits"]),
    ({"key_lengths": torch.tensor([7, 8])}, ValueError, ["key_lengths", "7", "[7, 8]"]),
    ({"key_lengths": torch.tensor([-1, 7])}, ValueError, ["key_lengths", "between 0", "[-1, 7]"]),
    ({"key_lengths": torch.tensor([7])}, ValueError, ["key_lengths", "[2]", "[1]"]),
    ({"key_lengths": torch.tensor([7.0, 7.0])}, TypeError, ["key_lengths", "float32", "integers"]),
    ({"key_lengths": "long"}, TypeError, ["key_lengths", "'long'", "ints"]),
    ({"key_lengths": torch.tensor([7, 7], device="meta")}, ValueError, ["key_lengths", "cpu", "meta"]),
    ({"key_lengths": torch.tensor([7, 7]).to_sparse()}, TypeError, ["key_lengths", "sparse_coo", "strided"]),
    ({"key_lengths": NESTED}, TypeError, ["key_lengths", "nested", "strided"]),
    ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'triton'"]),
]


@pytest.mark.parametrize("function", [scaled_dot_product_attention, explain])
@pytest.mark.parametrize(
    ("change", "exception", "words"), BAD, ids=[f"{'-'.join(c)}-{i}" for i, (c, *_) in enumerate(BAD)]
)
def test_wrong_arguments_are_named(change, exception, words, function):
    with pytest.raises(exception) as caught:
        function(**(GOOD | change))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "exception", "words"), [case for case in BAD if case[0].keys() & {"scale", "is_causal"}]
)
def test_the_short_way_of_equal_shapes_skips_no_check(change, exception, words):
    test_wrong_arguments_are_named(
        change | dict.fromkeys(("query", "key", "value"), GOOD["key"]), exception, words, scaled_dot_product_attention
    )


def test_lengths_on_the_cpu_are_checked_for_tensors_elsewhere():
    query = zeros(2, 1, 4, 8, device="meta")
    with pytest.raises(ValueError, match=r"key_lengths must be between 0 .* 4, got \[5, 1\]"):
        scaled_dot_product_attention(query, query, query, key_lengths=[5, 1])


def test_nothing_is_drawn_before_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="key_lengths"):
        explain(**GOOD, dropout_p=0.5, key_lengths=[9, 9])
    with pytest.raises(ValueError, match="attn_mask"):
        scaled_dot_product_attention(**GOOD, dropout_p=0.5, attn_mask=zeros(9, 9))
    assert torch.equal(torch.get_rng_state(), before)


BAD_MODULES = [
    ({"embed_dim": 10, "num_heads": 3}, ["embed_dim", "multiple", "10", "3"]),
    ({"embed_dim": 0, "num_heads": 1}, ["embed_dim", "positive"]),
    ({"embed_dim": 8, "num_heads": 0}, ["num_heads", "0"]),
    ({"embed_dim": 8.0, "num_heads": 2}, ["embed_dim", "an int", "8.0"]),
    ({"embed_dim": 8, "num_heads": "2"}, ["num_heads", "an int", "'2'"]),
    ({"embed_dim": 8, "num_heads": 2, "dropout": 1.5}, ["dropout", "1.5"]),
    ({"embed_dim": 8, "num_heads": 2, "dropout": torch.zeros(2)}, ["dropout", "a tensor of torch.float32", "a float"]),
    ({"embed_dim": 8, "num_heads": 2, "backend": "x"}, ["backend", "'x'"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_MODULES)
def test_wrong_module_arguments_are_named(arguments, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        fastattn.MultiHeadAttention(**arguments)
    for word in words:
        assert word in str(caught.value)


BAD_CALLS = [
    ({"query": zeros(2, 3, 5, 8)}, ValueError, ["query", "3-D", "[2, 3, 5, 8]"]),
    ({"query": zeros(2, 5, 6)}, ValueError, ["query", "last size 8", "[2, 5, 6]"]),
    ({"key": zeros(7, 8)}, ValueError, ["key", "3-D", "[7, 8]"]),
    ({"key": zeros(3, 7, 8), "value": zeros(3, 7, 8)}, ValueError, ["key", "batch size 2", "[3, 7, 8]"]),
    ({"value": zeros(2, 6, 8)}, ValueError, ["value", "[2, 7]", "[2, 6]"]),
    ({"key_padding_mask": zeros(2, 6)}, ValueError, ["key_padding_mask", "[2, 7]", "[2, 6]"]),
    ({"key_padding_mask": zeros(2, 7, dtype=torch.uint8)}, TypeError, ["key_padding_mask", "bool", "uint8"]),
    ({"attn_mask": zeros(5, 6)}, ValueError, ["attn_mask", "[5, 7]", "[8, 5, 7]", "[2, 4, 5, 7]", "[5, 6]"]),
    ({"attn_mask": zeros(2, 5, 7)}, ValueError, ["attn_mask", "[8, 5, 7]", "[2, 5, 7]"]),
    ({"attn_mask": zeros(5, 7, dtype=torch.int32)}, TypeError, ["attn_mask", "bool", "int32"]),
    ({"query": [1.0]}, TypeError, ["query", "Tensor", "list"]),
    ({"value": None}, TypeError, ["value", "Tensor", "NoneType"]),
    ({"key": zeros(2, 7, 8).to_sparse()}, TypeError, ["key", "sparse_coo", "strided"]),
    ({"attn_mask": zeros(5, 7).to_sparse()}, TypeError, ["attn_mask", "sparse_coo", "strided"]),
    ({"key_padding_mask": NESTED}, TypeError, ["key_padding_mask", "nested", "strided"]),
    ({"is_causal": torch.tensor([True, False])}, TypeError, ["is_causal", "a tensor of torch.bool", "a bool"]),
    ({"is_causal": "no"}, TypeError, ["is_causal", "'no'", "a bool"]),
    ({"need_weights": zeros(5, 7)}, TypeError, ["need_weights", "a tensor of torch.float32", "a bool"]),
    ({"average_attn_weights": zeros(5, 7)}, TypeError, ["average_attn_weights", "a tensor", "a bool"]),
]


@pytest.mark.parametrize(("change", "exception", "words"), BAD_CALLS)
def test_wrong_module_inputs_are_named(change, exception, words):
    module = fastattn.MultiHeadAttention(8, 4, batch_first=True)
    inputs = {"query": zeros(2, 5, 8), "key": zeros(2, 7, 8), "value": zeros(2, 7, 8)}
    with pytest.raises(exception) as caught:
        module(**(inputs | change))
    for word in words:
        assert word in str(caught.value)
