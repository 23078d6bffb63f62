"""What a person sees of the package: completion, help, and the example in it."""

from __future__ import annotations

import doctest
import importlib
import pydoc
import rlcompleter

import fastattn

PUBLIC = {
    *("MultiHeadAttention", "SelfAttention", "convert", "explain", "reference"),
    *("scaled_dot_product_attention", "unconvert"),
}


def test_completion_offers_the_public_names_alone():
    offered = {word.removeprefix("fastattn.").rstrip("()") for word in _completed("fastattn.")}
    assert {name for name in offered if not name.startswith("_")} == PUBLIC
    assert all(hasattr(fastattn, name) for name in PUBLIC)
    assert "__version__" in {word.removeprefix("fastattn.") for word in _completed("fastattn.__")}


def _completed(text: str) -> list[str]:
    return rlcompleter.Completer({"fastattn": fastattn}).attr_matches(text)


def test_modules_that_are_not_offered_are_there():
    for name in ("dispatch", "functional", "models", "ops", "problem", "testing"):
        assert importlib.import_module(f"fastattn.{name}") is getattr(fastattn, name)


def test_help_is_short_and_has_an_example():
    lines = pydoc.plain(pydoc.render_doc(fastattn)).splitlines()
    description = next(i for i, line in enumerate(lines) if line.startswith("PACKAGE CONTENTS"))
    assert description < 40 and len(lines) < 120
    assert any("fastattn.scaled_dot_product_attention(query, key, value" in line for line in lines[:description])
    for name in PUBLIC:
        assert any(name in line for line in lines[:description]), name


def test_the_example_runs():
    engine = fastattn.explain(*[fastattn.reference.torch.zeros(1, 1, 1, 8)] * 3).backend
    example = doctest.DocTestParser().get_doctest(
        fastattn.__doc__.replace("'cpu'", repr(engine)), {}, "fastattn", None, None
    )
    assert len(example.examples) == 7
    assert doctest.DocTestRunner(verbose=False).run(example) == (0, 7)
