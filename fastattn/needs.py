"""What each command needs beyond the package's dependencies.

A command asks :func:`require` before it does anything else. For that, modules import these packages only in the
functions that use them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

#: For each extra of pyproject.toml, the modules that its commands import. An option or a value after a command's
#: name is a row of its own: what it needs besides the command.
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "models": {
        "fastattn train translate": ("safetensors", "tokenizers", "matplotlib", "sacrebleu"),
        "fastattn train classify": ("safetensors", "tokenizers", "matplotlib", "sklearn"),
        "fastattn train detect": ("safetensors", "PIL", "matplotlib", "pycocotools", "scipy"),
        "fastattn train detect --data demo": ("sklearn",),
        "fastattn predict translate": ("safetensors", "tokenizers"),
        "fastattn predict translate --attention-map": ("matplotlib",),
        "fastattn predict classify": ("safetensors", "tokenizers"),
        "fastattn predict classify --png": ("matplotlib",),
        "fastattn predict detect": ("safetensors", "PIL"),
        "fastattn predict detect --pictures": ("matplotlib",),
        "examples/translate_dates.py": ("safetensors", "tokenizers", "matplotlib", "sacrebleu"),
        "examples/classify_reviews.py": ("safetensors", "tokenizers", "matplotlib", "sklearn"),
        "examples/digits.py": ("sklearn",),
    },
    "bench": {
        "python -m benchmarks.report run": ("pytest", "pytest_benchmark", "matplotlib", "scipy"),
        "python -m benchmarks.gpu plot": ("matplotlib",),
    },
}

#: The package that brings a module, where their names differ.
PACKAGES = {"PIL": "pillow", "pytest_benchmark": "pytest-benchmark", "sklearn": "scikit-learn"}


class MissingPackages(ImportError):
    """Packages that a command needs are not installed; the message is one line and says what to install."""


def require(command: str) -> None:
    """Raise unless all that ``command``, a row of :data:`NEEDS`, needs is installed.

    Raises:
        MissingPackages: it is not.
    """
    for extra, commands in NEEDS.items():
        missing = [PACKAGES.get(name, name) for name in commands.get(command, ()) if find_spec(name) is None]
        if missing:
            names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
            raise MissingPackages(f"{command} needs {names}: pip install 'fastattn[{extra}]'")


def require_or_exit(command: str) -> None:
    """:func:`require`, for a script: the message goes to stderr, and the exit status is 1."""
    try:
        require(command)
    except MissingPackages as error:
        sys.exit(f"error: {error}")
