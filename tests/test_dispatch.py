"""Which backend runs, what explain says, and what happens where parts of the installation are missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from fastattn import dispatch, explain, scaled_dot_product_attention
from fastattn.backends import missing


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
    others = {"torch": ["cpu comes first"], "reference": ["cpu comes first"]}
    assert explanation.reasons == {"triton": ["Triton is not installed"]} | others
    assert str(explanation) == repr(explanation)
    assert str(explanation).splitlines() == [
        "backend: cpu",
        "  triton: Triton is not installed",
        "  torch: cpu comes first",
        "  reference: cpu comes first",
    ]


def test_explain_follows_refusals_and_explicit_choices(stubbed):
    stubbed(cpu=Stub(reasons=["head_dim 8 is cursed", "and so is Monday"]), triton=ImportError("no module"))
    explanation = explain(query(), query(), query())
    assert explanation.backend == "torch"
    assert explanation.reasons["cpu"] == ["head_dim 8 is cursed", "and so is Monday"]
    assert explanation.reasons["reference"] == ["torch comes first"]
    explanation = explain(query(), query(), query(), dropout_p=0.5)
    assert explanation.backend == "reference"
    assert explanation.reasons["torch"] == ["its kernel has no dropout"]
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


#: Before torch is imported: no engine, for the given reason, and whatever else is said is an error.
WITHOUT_ENGINE = """
import pathlib, sys, types, warnings
sys.modules["fastattn._C"] = {extension}
sys.modules["triton"] = None
caught = []
warnings.showwarning = lambda message, category, file, *_: caught.append((category.__name__, file, str(message)))
import torch, fastattn, fastattn.backends.missing
from torch.nn.functional import scaled_dot_product_attention as torchs
fastattn.backends.missing.FOLDER = pathlib.Path({folder!r})
def said():
    return [text for *_, text in caught if "fastattn" in text]
"""


def without_engine(code: str, folder, extension: str = "None") -> list[str]:
    return run(WITHOUT_ENGINE.format(folder=str(folder), extension=extension) + textwrap.dedent(code)).splitlines()


@pytest.fixture
def failed_build(tmp_path):
    """The folder of a package whose engine could not be built."""
    (tmp_path / missing.RECORD).write_text("CMake Error: No CMAKE_CXX_COMPILER.\nIt needs g++: apt-get install g++\n")
    return tmp_path


def test_without_the_engine_torchs_attention_answers_with_one_warning(failed_build):
    output = without_engine(
        """
        query = torch.randn(2, 2, 5, 8, requires_grad=True)
        assert not said(), said()
        for _ in range(3):
            out = fastattn.scaled_dot_product_attention(query, query, query, is_causal=True)
        out.sum().backward()
        torch.testing.assert_close(out, torchs(query, query, query, is_causal=True))
        fastattn.scaled_dot_product_attention(query, query, query, dropout_p=0.5)  # by the reference
        module = fastattn.MultiHeadAttention(8, 2)
        module(*[torch.randn(3, 2, 8)] * 3)
        print(len(said()), *caught[-1][:2])
        print(said()[0])
        print(fastattn.explain(query, query, query))
        try:
            fastattn.scaled_dot_product_attention(query, query, query, backend="cpu")
        except ValueError as error:
            print("explicit:", error)
        """,
        failed_build,
    )
    assert output[0] == "1 RuntimeWarning <string>"  # at the line of the caller's code
    assert output[1].startswith("fastattn computes with torch's own attention")
    cause = "CMake Error: No CMAKE_CXX_COMPILER. It needs g++: apt-get install g++, then install fastattn again"
    assert cause in output[1]
    assert output[2] == "backend: torch"
    assert any(line.startswith("  cpu:") and cause in line for line in output[3:])
    assert any(line.startswith("  triton:") for line in output)
    assert output[-1].startswith("explicit: backend='cpu' cannot compute this call")


def test_the_warning_tells_of_the_reference_where_that_computes(stubbed, monkeypatch):
    stubbed(cpu=Stub(unavailable="install g++"))
    said = []
    monkeypatch.setattr(dispatch, "_warn_once", lambda *message_and_key: said.append(message_and_key))
    scaled_dot_product_attention(query(), query(), query(), dropout_p=0.5)
    scaled_dot_product_attention(query(), query(), query())
    (of_reference, key), (of_torch, other_key) = said
    assert of_reference == (
        "fastattn computes with the dense reference, slowly and in O(Lq * Lk) memory, because cpu: install g++ and "
        "torch: its kernel has no dropout"
    )
    assert of_torch.startswith("fastattn computes with torch's own attention")
    assert key == other_key == "cpu: install g++"  # one of them is shown in a process


def test_an_engine_of_other_sources_is_of_no_use(tmp_path):
    code = "print(fastattn.explain(*torch.zeros(3, 1, 1, 2, 4)))"
    output = without_engine(code, tmp_path, "types.ModuleType('an older build')")
    assert output[0] == "backend: torch"
    (of_engine,) = (line for line in output if line.startswith("  cpu:"))
    assert "cannot be loaded" in of_engine and "use_torch" in of_engine


@pytest.mark.parametrize(
    ("files", "words"),
    [([], "the C++ engine is missing"), (["_C.cpython-27-x.so"], "_C.cpython-27-x.so, for another Python")],
    ids=["no file", "of another Python"],
)
def test_an_engine_that_is_not_there_is_explained(files, words, tmp_path, monkeypatch):
    monkeypatch.setattr(missing, "FOLDER", tmp_path)
    for file in files:
        (tmp_path / file).touch()
    story = missing.why(ModuleNotFoundError("No module named 'fastattn._C'"))
    assert words in story
    assert "apt-get install g++" in story


def test_an_engine_that_cannot_be_loaded_is_explained():
    """As by the system's loader, where a library that it needs is missing."""
    story = missing.why(ImportError("libgomp.so.1: cannot open shared object file"))
    assert "cannot be loaded (libgomp.so.1: cannot open shared object file)" in story
    assert "apt-get install libgomp1" in story


def test_without_the_engine_modules_train_and_functions_compile(failed_build):
    output = without_engine(
        """
        torch.manual_seed(0)
        theirs, ours = torch.nn.MultiheadAttention(16, 4), fastattn.MultiHeadAttention(16, 4)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(9, 3, 16)
        padding = torch.arange(9) >= torch.tensor([[9], [4], [6]])
        for module in (theirs, ours):
            module(x, x, x, key_padding_mask=padding)[0].square().sum().backward()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)

        def attend(query, key, lengths):
            return fastattn.scaled_dot_product_attention(query, key, key, causal="lower_right", key_lengths=lengths)

        query, key = torch.randn(2, 2, 5, 8, requires_grad=True), torch.randn(2, 2, 7, 8)
        lengths = torch.tensor([7, 3])
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        expected = fastattn.scaled_dot_product_attention(
            query, key, key, causal="lower_right", key_lengths=lengths, backend="reference"
        )
        actual = compiled(query, key, lengths)
        torch.testing.assert_close(actual, expected)
        for one, other in zip(*(torch.autograd.grad(x.sum(), query) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(one, other)
        print(len(said()), fastattn.explain(query, key, key).backend)
        """,
        failed_build,
    )
    assert output == ["1 torch"]


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
