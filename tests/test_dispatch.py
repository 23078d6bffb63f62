"""Which backend runs, what explain says, and what happens where parts of the installation are missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import fastattn
from fastattn import dispatch, explain, scaled_dot_product_attention


class Stub:
    """A backend that refuses for the given reasons."""

    def __init__(self, unavailable=None, reasons=()):
        self._unavailable, self._reasons = unavailable, list(reasons)

    def unavailable(self):
        return self._unavailable

    def reasons(self, problem):
        return self._reasons


@pytest.fixture
def stubbed(monkeypatch):
    """Replace backends by stubs: stubbed(cpu=Stub(...), triton=ImportError(...))."""
    original = dispatch.load

    def install(**stubs):
        monkeypatch.setattr(dispatch, "load", lambda name: stubs.get(name) or original(name))

    return install


def query():
    return torch.randn(1, 2, 5, 8)


def test_explain_names_the_backend_and_each_others_reasons(stubbed):
    stubbed(cpu=Stub(), triton=Stub(unavailable="Triton is not installed"))
    explanation = explain(query(), query(), query())
    assert explanation.backend == "cpu"
    assert explanation.reasons == {"triton": ["Triton is not installed"], "reference": ["cpu comes first"]}
    assert str(explanation) == repr(explanation)
    assert str(explanation).splitlines() == [
        "backend: cpu",
        "  triton: Triton is not installed",
        "  reference: cpu comes first",
    ]


def test_explain_follows_refusals_and_explicit_choices(stubbed):
    stubbed(cpu=Stub(reasons=["head_dim 8 is cursed", "and so is Monday"]), triton=ImportError("no module"))
    explanation = explain(query(), query(), query())
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == ["head_dim 8 is cursed", "and so is Monday"]
    assert explanation.reasons["triton"] == ["could not be imported: no module"]
    assert explain(query(), query(), query(), backend="cpu").backend is None
    asked = explain(query(), query(), query(), backend="reference")
    assert asked.backend == "reference"
    assert asked.reasons["cpu"] == ["head_dim 8 is cursed", "and so is Monday"]
    stubbed(cpu=Stub(), triton=Stub())
    automatic = explain(query(), query(), query())
    assert automatic.reasons["triton"] == ["not chosen automatically for cpu tensors"]
    asked = explain(query(), query(), query(), backend="triton")
    assert asked.backend == "triton"
    assert asked.reasons["cpu"] == ["backend='triton' was asked for"]


def test_an_explicit_backend_never_falls_back(stubbed):
    stubbed(cpu=Stub(reasons=["too tired"]), triton=Stub(unavailable="no GPU"))
    with pytest.raises(ValueError, match="backend='cpu' cannot compute this call: too tired"):
        scaled_dot_product_attention(query(), query(), query(), backend="cpu")
    with pytest.raises(ValueError, match="backend='triton' cannot compute this call: no GPU"):
        scaled_dot_product_attention(query(), query(), query(), backend="triton")
    with pytest.raises(ValueError, match="no GPU"):
        scaled_dot_product_attention(query().requires_grad_(), query(), query(), backend="triton")


def test_explain_takes_every_argument_and_draws_nothing():
    tensor = query()
    before = torch.get_rng_state()
    explanation = explain(
        tensor,
        tensor,
        tensor,
        torch.ones(5, 5, dtype=torch.bool),
        0.5,
        True,
        0.3,
        True,
        window=(3, 1),
        key_lengths=[4],
        backend="reference",
        return_lse=True,
    )
    assert explanation.backend == "reference"
    assert torch.equal(torch.get_rng_state(), before)


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout


@pytest.mark.parametrize("extension", ["None", "types.ModuleType('an older build')"])
def test_without_the_extension_and_triton_the_reference_answers_with_one_warning(extension):
    output = run(
        """
        import sys, types, warnings
        sys.modules["fastattn._C"] = EXTENSION
        sys.modules["triton"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, fastattn
            fast = [w for w in caught if "fastattn" in str(w.message)]
            assert not fast, fast
            query = torch.randn(2, 2, 5, 8, requires_grad=True)
            for _ in range(3):
                out = fastattn.scaled_dot_product_attention(query, query, query, is_causal=True)
            out.sum().backward()
            module = fastattn.MultiHeadAttention(8, 2)
            module(torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8))
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.testing.assert_close(out, expected)
        fast = [w for w in caught if "fastattn" in str(w.message)]
        print(len(fast), fast[0].category.__name__)
        print(fast[0].message)
        print(fastattn.explain(query, query, query))
        try:
            fastattn.scaled_dot_product_attention(query, query, query, backend="cpu")
        except ValueError as error:
            print("explicit:", error)
        """.replace("EXTENSION", extension)
    ).splitlines()
    assert output[0] == "1 RuntimeWarning"
    assert "dense reference" in output[1]
    assert "_C" in output[1]
    assert output[2] == "backend: reference"
    assert any(line.startswith("  triton:") for line in output)
    assert output[-1].startswith("explicit: backend='cpu' cannot compute this call")


def test_importing_does_not_import_triton_or_start_cuda():
    output = run(
        """
        import sys, torch
        before = "triton" in sys.modules
        import fastattn
        print(before or "triton" not in sys.modules, torch.cuda.is_initialized())
        """
    )
    assert output.split() == ["True", "False"]


def test_the_public_names():
    assert set(fastattn.__all__) == {
        "MultiHeadAttention",
        "SelfAttention",
        "__version__",
        "convert",
        "explain",
        "reference",
        "scaled_dot_product_attention",
        "unconvert",
    }
    assert all(hasattr(fastattn, name) for name in fastattn.__all__)
