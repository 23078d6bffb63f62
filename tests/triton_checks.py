"""What the plain Triton kernels must do at the edges of their tiles, checked under Triton's interpreter.

The interpreter has to be on before Triton is imported, so ``python tests/triton_checks.py NAME...`` runs in a
process of its own; it prints one JSON object per check. Tiles are small, so that small problems have full,
border and skipped ones; keys that no query may attend to hold NaN.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from fastattn import reference
from fastattn.problem import make_problem
from fastattn.testing import Case, assert_within_budget, run_backend, run_reference

SMALL = {"batch": 1, "heads": 2, "queries": 37, "keys": 70, "head_dim": 16}

#: (case, dtype): every ingredient, and every pair of ingredients that meet in one line of a kernel.
CASES = [
    (Case("plain", **SMALL), "float32"),
    (Case("one_by_one", batch=1, heads=1, queries=1, keys=1, head_dim=8), "bfloat16"),
    (Case("tile_edges", batch=1, heads=1, queries=32, keys=64, head_dim=32), "float16"),
    (Case("upper_left", **SMALL, causal="upper_left"), "bfloat16"),
    (Case("lower_right", **SMALL, causal="lower_right"), "float16"),
    (Case("lower_right_more_queries", batch=1, heads=1, queries=70, keys=37, causal="lower_right"), "bfloat16"),
    (Case("window", **SMALL, window=(9, 3)), "float32"),
    (Case("window_left_causal", **SMALL | {"queries": 70}, window=(20, None), causal="upper_left"), "bfloat16"),
    (Case("window_right", **SMALL, window=(None, 5)), "float16"),
    (Case("lengths", **SMALL | {"batch": 3}, key_lengths=(70, 0, 33)), "bfloat16"),
    (Case("lengths_lower_right", **SMALL | {"batch": 2}, key_lengths=(70, 20), causal="lower_right"), "float32"),
    (Case("mask_full", **SMALL, mask="full", masked_rows=True), "bfloat16"),
    (Case("mask_keys_causal", **SMALL, mask="keys", causal="upper_left"), "float16"),
    (Case("bias_full", **SMALL, bias="full"), "bfloat16"),
    (Case("bias_shared", **SMALL | {"batch": 2}, bias="shared", masked_rows=True), "float32"),
    (Case("bias_per_head", **SMALL | {"batch": 2}, bias="per_head", window=(16, 16)), "float16"),
    (Case("bias_keys", **SMALL, bias="keys", masked_rows=True), "float16"),
    (Case("bias_per_batch", **SMALL | {"batch": 2}, bias="per_batch"), "float32"),
    (Case("bias_queries", **SMALL, bias="queries"), "bfloat16"),
    (Case("bias_scalar", **SMALL, bias="scalar"), "float32"),
    (Case("dropout", **SMALL, dropout_p=0.3), "float32"),
    (Case("grouped", **SMALL | {"heads": 4}, kv_heads=2, causal="lower_right"), "bfloat16"),
    (Case("grouped_bias_dropout", **SMALL | {"heads": 4}, kv_heads=1, bias="per_head", dropout_p=0.2), "float16"),
    (Case("value_dim", **SMALL | {"head_dim": 40}, value_dim=24), "bfloat16"),
    (Case("head_dim_5", **SMALL | {"head_dim": 5}, value_dim=70, layout="transposed"), "float32"),
    (Case("packed", **SMALL | {"heads": 3}, layout="packed"), "float16"),
    (Case("broadcast", **SMALL | {"batch": 2}, layout="broadcast"), "bfloat16"),
    (Case("negative_scale", **SMALL, scale=-0.3), "float32"),
    (Case("long_rows", **SMALL | {"head_dim": 70}, value_dim=40, bias="keys", key_lengths=(50,)), "float32"),
    (Case("no_keys", batch=1, queries=5, keys=0), "float32"),
    (Case("no_queries", batch=1, queries=0, keys=5), "float32"),
]
TMA_CASES = ("upper_left", "window", "lengths", "mask_keys_causal", "bias_full", "grouped", "value_dim")


def with_hidden_keys_poisoned(problem):
    """NaN in every key and value that no query of any head may attend to."""
    visible = reference.allowed(problem).expand(*problem.query.shape[:3], problem.key.shape[2]).any(2)
    hidden = ~visible.unflatten(1, (-1, problem.group_size)).any(2)[..., None]
    if not hidden.any():
        return problem
    return problem._replace(
        key=problem.key.masked_fill(hidden, torch.nan), value=problem.value.masked_fill(hidden, torch.nan)
    )


def check_case(case: Case, dtype: str, tma: bool = False) -> None:
    """Forward and backward within the error budget, bitwise equal when repeated."""
    from fastattn.kernels import launch
    from fastattn.kernels.configs import Config

    config = Config(16, 32, tma=tma, chunk=32)
    backend = SimpleNamespace(
        forward=partial(launch.forward, config=config),
        backward=partial(launch.backward, key_value_config=config, query_config=config),
    )
    problem = case.make(dtype=getattr(torch, dtype))
    grad_out = case.make_grad_out(dtype=problem.query.dtype)
    grad_lse = case.make_grad_lse()
    poisoned = with_hidden_keys_poisoned(problem)
    results = run_backend(backend, poisoned, grad_out, grad_lse)
    exact = run_reference(problem, grad_out, grad_lse)
    naive = run_reference(problem, grad_out, grad_lse, dtype=None)
    assert_within_budget(results, problem, exact, naive, grad_out)
    again = run_backend(backend, poisoned, grad_out, grad_lse)
    for name, tensor in results.items():
        assert torch.equal(tensor, again[name]), f"{name} differs when repeated"


def check_default_configurations() -> None:
    """The shipped tiles, through the public function and autograd."""
    import fastattn

    case = Case("default", batch=1, heads=2, queries=70, keys=140, causal="lower_right")
    problem = case.make(dtype=torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def results(tensors, backend):
        out = fastattn.scaled_dot_product_attention(*tensors, causal="lower_right", backend=backend)
        return out, *torch.autograd.grad(out.double().square().sum(), tensors)

    for found, expected in zip(results(inputs, "triton"), results(exact, "reference"), strict=True):
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < 0.02, error


def check_decode(splits: int, **ingredients) -> None:
    """Few queries, the keys split: equal to the reference, also for empty rows and empty splits."""
    from fastattn.kernels import launch
    from fastattn.kernels.configs import Config

    case = Case("decode", batch=2, heads=4, kv_heads=2, queries=3, keys=150, head_dim=16, **ingredients)
    problem = case.make(dtype=torch.bfloat16)
    backend = SimpleNamespace(forward=lambda p, out, lse: launch.decode(p, out, lse, splits, Config(16, 32)))
    results = run_backend(backend, with_hidden_keys_poisoned(problem))
    assert_within_budget(results, problem, run_reference(problem), run_reference(problem, dtype=None))


def check_decode_is_chosen() -> None:
    """The backend splits the keys of a long cache by itself."""
    from fastattn.backends import triton as backend
    from fastattn.kernels import launch

    problem = Case("cache", batch=1, heads=4, kv_heads=1, queries=1, keys=1030, head_dim=16).make()
    assert launch.splits_keys(problem) and launch.decode_splits(problem) > 1
    results = run_backend(backend, problem)
    assert_within_budget(results, problem, run_reference(problem), run_reference(problem, dtype=None))


def check_weights(average: bool) -> None:
    """The weights after dropout, per head and averaged."""
    from fastattn.backends import triton as backend

    case = Case(
        "weights", batch=2, heads=4, kv_heads=2, queries=20, keys=40, head_dim=16, mask="full", masked_rows=True
    )
    problem = case.make()._replace(causal="lower_right", dropout_p=0.25)
    out = problem.query.new_empty(2, 4, 20, 16)
    lse = out.new_empty(2, 4, 20)
    backend.forward(problem, out, lse)
    weights = out.new_full((2, 20, 40) if average else (2, 4, 20, 40), torch.nan)
    backend.weights(problem, lse, weights, average)
    expected = reference.weights(reference.in_dtype(problem, torch.float64), average)
    assert (weights - expected).abs().max() < 1e-5


def check_same_drops() -> None:
    """The kernels drop exactly the elements that the specification drops, whatever seed and offset."""
    from fastattn.backends import triton as backend

    query = torch.zeros(2, 3, 21, 16)
    key = value = torch.zeros(2, 3, 50, 16)
    for seed, offset in ((0, 0), (2**62 + 12345, 2**40 + 2**31 + 5), (-3, 1)):
        problem = make_problem(query, key, value, dropout_p=0.4, rng_state=torch.tensor([seed, offset]))
        weights = torch.full((2, 3, 21, 50), torch.nan)
        backend.weights(problem, torch.zeros(2, 3, 21), weights, False)
        assert torch.equal(weights != 0, reference.dropout_keep(problem))


def check_dropout_of_the_cpu_engine() -> None:
    """Seed and offset drop the same weights on the CPU engine: outputs and gradients agree to rounding."""
    from fastattn.backends import cpu
    from fastattn.backends import triton as backend

    case = Case("drops", batch=2, heads=4, kv_heads=2, queries=37, keys=50, head_dim=16, dropout_p=0.4)
    problem, grad_out = case.make(), case.make_grad_out()
    theirs = run_backend(cpu, problem, grad_out)
    for name, tensor in run_backend(backend, problem, grad_out).items():
        assert (tensor - theirs[name]).abs().max() < 1e-5, name


def check_all_dropped() -> None:
    """A dropout of 1 gives zeros, and zeros for gradients; the lse is that before dropout."""
    from fastattn.backends import triton as backend

    case = Case("dropped", **SMALL, dropout_p=0.5)
    problem = case.make(dtype=torch.float32)
    results = run_backend(backend, problem._replace(dropout_p=1.0), case.make_grad_out(dtype=torch.float32))
    exact_lse = run_reference(problem)["lse"]
    assert (results.pop("lse") - exact_lse).abs().max() < 1e-5
    for name, tensor in results.items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name


def check_nan_shows() -> None:
    """A NaN in a key or query shows in the lse and the output of exactly the queries that see it."""
    from fastattn.kernels import launch
    from fastattn.kernels.configs import Config

    forwards = partial(launch.forward, config=Config(16, 32)), lambda *a: launch.decode(*a, 3, Config(16, 32))
    for forward in forwards:
        for place in ("key", "query"):
            case = Case("nan", **SMALL | {"queries": 9}, causal="lower_right")
            problem = case.make(dtype=torch.float32)
            getattr(problem, place)[0, 0, 5, 3] = torch.nan
            results = run_backend(SimpleNamespace(forward=forward), problem)
            exact = run_reference(problem)
            assert torch.equal(results["lse"].isnan(), exact["lse"].isnan())
            assert torch.equal(results["out"].isnan(), exact["out"].isnan())


def check_module() -> None:
    """The layer on this backend, with padding: output, averaged weights and gradients as torch's in float64."""
    import fastattn

    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    ours = fastattn.MultiHeadAttention(32, 4, batch_first=True, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    padding = torch.arange(19) >= torch.tensor([[19], [11]])
    results = {}
    for layer, dtype in ((theirs, torch.float64), (ours, torch.float32)):
        inputs = x.detach().clone().to(dtype).requires_grad_()
        out, weights = layer(inputs, inputs, inputs, key_padding_mask=padding, need_weights=True)
        (out.square().sum() + weights.square().sum()).backward()
        results[dtype] = [out, weights, inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    for exact, found in zip(*results.values(), strict=True):
        assert (found.double() - exact).abs().max() < 1e-5 * max(1.0, exact.abs().max())


def check_autocast() -> None:
    """float32 inputs under autocast: computed in bfloat16, gradients in float32."""
    import fastattn

    inputs = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.scaled_dot_product_attention(*inputs, is_causal=True, backend="triton")
    assert out.dtype == torch.bfloat16
    exact = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    assert (out - exact).abs().max() < 0.03
    found, expected = (torch.autograd.grad(result.float().sum(), inputs) for result in (out, exact))
    for grad, exact_grad in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32 and (grad - exact_grad).abs().max() < 0.03 * exact_grad.abs().max()


def check_guard() -> None:
    """NaN in a key hidden from all changes no bit, although it sends its head through other loops; seen, it shows."""
    from fastattn.backends import triton as backend

    mask = torch.rand(1, 1, 40, 70) < 0.7
    mask[..., 50] = False
    mask[..., 51] = True
    query, key, value, grad_out = (torch.randn(2, 2, length, 16) for length in (40, 70, 70, 40))
    clean = run_backend(backend, make_problem(query, key, value, mask), grad_out)
    for tensor in (key, value):
        tensor[:, 0, 50] = torch.nan
    hidden = run_backend(backend, make_problem(query, key, value, mask), grad_out)
    for name, result in hidden.items():
        assert torch.equal(result, clean[name]), name
    value[0, 1, 51, 3] = torch.nan
    seen = run_backend(backend, make_problem(query, key, value, mask))["out"]
    assert seen[0, 1, :, 3].isnan().all()
    assert torch.equal(seen[:, 0], clean["out"][:, 0]) and torch.equal(seen[1], clean["out"][1])


def check_large_lse(dtype: torch.dtype, **ingredients) -> None:
    """Rows with a large lse, which has no room for the sum of weights: gradients are right, weights add up to one."""
    from fastattn.backends import triton as backend

    case = Case("large", batch=1, heads=2, queries=37, keys=33, head_dim=16, **ingredients)
    problem, grad_out = case.make(dtype=dtype), case.make_grad_out(dtype=dtype)
    if problem.bias is not None:
        bias = problem.bias.clone()
        lowest = torch.finfo(dtype).min
        for row, huge in ((3, lowest), (5, lowest / 2), (7, -2e4), (11, 3e4), (34, max(lowest, -1e9))):
            bias[:, :, row] = huge
        problem = problem._replace(bias=bias)
    results = run_backend(backend, problem, grad_out)
    naive = run_reference(problem, grad_out, dtype=None)
    exact = run_reference(problem, grad_out)
    lse = results["lse"]
    assert lse[lse.isfinite()].abs().max() > 1024
    assert_within_budget(results, problem, exact, naive, grad_out)
    weights = torch.full((1, 2, 37, 33), torch.nan)
    backend.weights(problem, lse, weights, False)
    assert (weights.sum(-1) - lse.isfinite().float()).abs().max() < 1e-5


def check_lowest_bias(queries: int, keys: int, dtype: torch.dtype) -> None:
    """A bias of finfo.min everywhere forbids nothing: out is the mean of V, the weights and gradients those of it."""
    from fastattn.backends import triton as backend

    query, key, value, grad_out = (torch.randn(1, 1, length, 16).to(dtype) for length in (queries, keys, keys, queries))
    lowest = torch.finfo(dtype).min
    problem = make_problem(query, key, value, torch.full((queries, keys), lowest, dtype=dtype))
    results = {name: result.double() for name, result in run_backend(backend, problem, grad_out).items()}
    mean, unit = value.double().mean(2, keepdim=True), torch.finfo(dtype).eps
    assert (results["lse"] / lowest - 1).abs().max() < (1e-6 if dtype == torch.float32 else 5e-3)
    assert (results["out"] - mean).abs().max() < 8 * unit
    grad_scores = grad_out.double() @ (value.double() - mean).mT / keys
    exact = {
        "grad_query": problem.scale * grad_scores @ key.double(),
        "grad_key": problem.scale * grad_scores.mT @ query.double(),
        "grad_value": grad_out.double().sum(2, keepdim=True).expand_as(value) / keys,
        "grad_bias": grad_scores,
    }
    for name, gradient in exact.items():
        error = (results[name] - gradient).abs().max()
        assert error < 8 * unit * gradient.abs().max(), (name, error, gradient.abs().max())
    weights = torch.full((1, queries, keys), torch.nan)
    backend.weights(problem, results["lse"].float(), weights, True)
    assert (weights * keys - 1).abs().max() < 1e-6


def check_refusals() -> None:
    """What the engine cannot take, it says."""
    from fastattn.backends import triton as backend

    double = make_problem(*torch.zeros(3, 1, 1, 4, 8, dtype=torch.float64))
    wide = make_problem(*torch.zeros(3, 1, 1, 4, 513))
    assert any("float64" in reason for reason in backend.reasons(double))
    assert any("513" in reason and "512" in reason for reason in backend.reasons(wide))
    assert backend.unavailable() is None


CHECKS: dict[str, Callable[[], None]] = {
    **{f"{case.name}-{dtype}": partial(check_case, case, dtype) for case, dtype in CASES},
    **{f"{case.name}-tma": partial(check_case, case, "float16", True) for case, _ in CASES if case.name in TMA_CASES},
    "default_configurations": check_default_configurations,
    "decode_lengths": partial(check_decode, 4, key_lengths=(0, 100)),
    "decode_causal_window": partial(check_decode, 2, causal="lower_right", window=(60, None)),
    "decode_mask_bias": partial(check_decode, 1, mask="full", bias="per_head", masked_rows=True),
    "decode_is_chosen": check_decode_is_chosen,
    "weights": partial(check_weights, False),
    "weights_average": partial(check_weights, True),
    "same_drops": check_same_drops,
    "dropout_of_the_cpu_engine": check_dropout_of_the_cpu_engine,
    "all_dropped": check_all_dropped,
    "nan_shows": check_nan_shows,
    "module": check_module,
    "autocast": check_autocast,
    "guard": check_guard,
    "lowest_bias": partial(check_lowest_bias, 33, 40, torch.float32),
    "lowest_bias-bfloat16": partial(check_lowest_bias, 33, 40, torch.bfloat16),
    "lowest_bias-split_keys": partial(check_lowest_bias, 2, 520, torch.float32),
    "large_lse-float32": partial(check_large_lse, torch.float32, bias="full"),
    "large_lse-float16": partial(check_large_lse, torch.float16, bias="full"),
    "large_lse-mask_grouped": partial(check_large_lse, torch.float32, bias="full", mask="keys", kv_heads=1),
    "large_lse-scores_causal": partial(check_large_lse, torch.float32, scale=400.0, causal="lower_right"),
    "refusals": check_refusals,
}


def main(names: list[str]) -> int:
    """How many of the named checks, or of all, fail."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    from fastattn.kernels import interpreter

    interpreter.mend()
    torch.set_num_threads(1)
    failures = 0
    for name in names or CHECKS:
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            failure = None
        except Exception:
            failure = traceback.format_exc()
            failures += 1
        print(json.dumps({"name": name, "failure": failure}), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
