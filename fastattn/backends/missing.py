"""Why the C++ engine is not there, and what to do about it, in words for warnings and for ``fastattn info``."""

from __future__ import annotations

import sysconfig
from pathlib import Path

#: The folder in which the extension lies, if it was built.
FOLDER = Path(__file__).resolve().parents[1]
#: Where setup.py writes why it could not build the extension, and in the second line what to do.
RECORD = "_C_build_error.txt"

INSTALL_AGAIN = "install fastattn again (pip install --force-reinstall --no-deps --no-cache-dir)"


def why(error: Exception) -> str:
    """The story behind an error that importing ``fastattn._C``, or asking it for something, has raised."""
    if not isinstance(error, ModuleNotFoundError):
        return (
            f"the C++ engine is there, but cannot be loaded ({error}): if that names a library that is missing, "
            f"install it (libgomp.so.1: apt-get install libgomp1), else {INSTALL_AGAIN}"
        )
    recorded = _recorded()
    if recorded:
        cause, remedy = recorded
        return f"the C++ engine could not be built when fastattn was installed: {cause} {remedy}, then {INSTALL_AGAIN}"
    return (
        f"the C++ engine is missing ({_found()}): {INSTALL_AGAIN}, for which a C++17 compiler has to be there (g++: "
        "apt-get install g++)"
    )


def _recorded() -> list[str]:
    """[what the build said, what to do], or nothing where no build has failed."""
    try:
        lines = (FOLDER / RECORD).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return lines[:2] if len(lines) >= 2 else []


def _found() -> str:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    others = sorted(
        path.name for path in FOLDER.glob("_C.*") if path.name != f"_C{suffix}" and path.suffix in (".so", ".pyd")
    )
    if others:
        return f"there is {others[0]}, for another Python than this one, whose would be _C{suffix}"
    return f"there is no _C{suffix} in {FOLDER}"
