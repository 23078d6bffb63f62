"""Registering with a part of PyTorch when that part is imported, because importing it takes long and few need it."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder


class _Watcher(MetaPathFinder):
    """Finds nothing itself: it lets the others find the awaited modules, and acts after they have run."""

    def __init__(self) -> None:
        self.awaited: dict[str, str] = {}

    def find_spec(self, name, path, target=None):
        integration = self.awaited.get(name)
        if integration is None:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_integrate(module) -> None:
                execute(module)
                _integrate(name, self.awaited.pop(name, integration))

            spec.loader.exec_module = execute_and_integrate
        return spec


def _integrate(name: str, integration: str) -> None:
    try:
        importlib.import_module(integration)
    except Exception as error:  # the import of ``name`` has succeeded, and must not fail because of this one
        warnings.warn(f"{name} will not know fastattn's operators: {error!r}", RuntimeWarning, stacklevel=2)


_watcher = _Watcher()


def integrate_on_import(name: str, integration: str) -> None:
    """Import the module ``integration`` as soon as the module ``name`` has been, which may be now."""
    if name in sys.modules:
        _integrate(name, integration)
        return
    _watcher.awaited[name] = integration
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
