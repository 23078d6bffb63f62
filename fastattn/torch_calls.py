"""Where the modules of a model call torch's scaled_dot_product_attention themselves, by the code of their forwards.

Nothing is run, and nothing is imported: names are looked up in what is loaded, past the hooks of the objects that they
lead to. So a call is found that reaches torch's function by a name of its module or by an attribute of a module, in a
forward or a ``__call__``, in a method of its class, or in functions that these call; not one through an object, a table
or an argument. Where the function is only mentioned, that is taken for a call.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType

import torch
from torch import nn

_ATTENTION = torch._C._nn.scaled_dot_product_attention
_GRAPH_NODE = "aten::scaled_dot_product_attention"
#: How many functions deep a call is looked for.
_DEPTH = 4
_UNKNOWN = object()
#: Packages whose functions are not looked into: what they call is their own affair.
_FOREIGN = ("torch", "fastattn")
#: Of a config of transformers: the attribute, and the one that it is kept in where a property stands for it.
_INTERFACES = ("_attn_implementation", "_attn_implementation_internal")


class _Instance:
    """Stands for ``self``, of a known class."""

    def __init__(self, cls: type) -> None:
        self.cls = cls


def attention_calls(modules: Iterable[tuple[str, nn.Module]], unread: dict[str, str]) -> dict[str, str]:
    """For each module that calls torch's function itself, by name, where: "file:line".

    Those that could not be looked at enter ``unread``, with the name of the exception.
    """
    search = _Search()
    places = {name: _advice(search.in_module, module, name, unread) for name, module in modules}
    return {name: place for name, place in places.items() if place is not None}


def attention_interface(model: nn.Module, unread: dict[str, str]) -> str | None:
    """ "sdpa" if the model's attention reaches torch's function by a name in its config, as transformers' models do."""
    return _advice(_interface, model, "config", unread)


def _advice(
    look: Callable[[nn.Module], str | None], module: nn.Module, name: str, unread: dict[str, str]
) -> str | None:
    try:
        return look(module)
    except Exception as error:  # whatever it is, advice must not cost the conversion
        unread[name] = type(error).__name__
        return None


def _interface(model: nn.Module) -> str | None:
    config = inspect.getattr_static(model, "config", None)
    values = [inspect.getattr_static(config, name, None) for name in _INTERFACES]
    return "sdpa" if any(type(value) is str and value == "sdpa" for value in values) else None


class _Search:
    """Reads each function once: the classes of a model share most of those that they call."""

    def __init__(self) -> None:
        self._read: dict[tuple, tuple[str | None, dict]] = {}
        self._places: dict[tuple, str | None] = {}

    def in_module(self, module: nn.Module) -> str | None:
        cls = type(module)
        if issubclass(cls, torch.jit.ScriptModule):
            return "compiled by torch.jit" if _is_in_graph(module) else None
        forwards, own = _definitions(cls, "forward"), _attributes(module).get("forward")
        if own is not None:
            forwards[:1] = [own]
        return self._in_methods(_definitions(cls, "__call__"), cls) or self._in_methods(forwards, cls)

    def _in_methods(self, definitions: list, cls: type) -> str | None:
        """In the first definition of a method, and in those of the bases as long as one speaks of ``super``."""
        for definition in definitions:
            function, owner = _unwrapped(definition), cls
            if _is_attention(function):
                return f"the forward of {type.__getattribute__(cls, '__qualname__')}"
            if type(function) is not FunctionType:  # an object with a method __call__
                owner = type(function)
                function = inspect.getattr_static(owner, "__call__", None)
            if not _is_readable(function):
                return None
            place = self._place(function, owner, _DEPTH)
            if place is not None or "super" not in function.__code__.co_names:
                return place
        return None

    def _place(self, function: FunctionType, cls: type | None, depth: int) -> str | None:
        """Where the function, a method of ``cls`` if that is given, or one that it calls, calls torch's."""
        key = function, id(cls), depth
        if key not in self._places:
            place, called = self._reading(function, cls)
            if place is None and depth > 0:
                places = (self._place(*callee, depth - 1) for callee in called.items())
                place = next((found for found in places if found is not None), None)
            self._places[key] = place
        return self._places[key]

    def _reading(self, function: FunctionType, cls: type | None) -> tuple[str | None, dict]:
        key = function, id(cls)
        if key not in self._read:
            self._read[key] = _read(function, cls)
        return self._read[key]


def _read(function: FunctionType, cls: type | None) -> tuple[str | None, dict[FunctionType, type | None]]:
    """Where the function's own code calls torch's, or what else it calls, with the class of what may be a method."""
    own_name = _first_parameter(function) if cls is not None else None
    called = {}
    for value, line in _values(function, function.__code__, cls, own_name):
        value = _unwrapped(value)
        if _is_attention(value):
            return f"{function.__code__.co_filename}:{line}", {}
        if _is_readable(value):
            called[value] = cls if _first_parameter(value) in ("self", own_name) else None
    return None, called


def _first_parameter(function: FunctionType) -> str | None:
    code = function.__code__
    return code.co_varnames[0] if code.co_argcount else None


def _definitions(cls: type, name: str) -> list:
    """What a class and its bases have under that name."""
    namespaces = [type.__getattribute__(base, "__dict__") for base in type.mro(cls)]
    return [namespace[name] for namespace in namespaces if name in namespace]


def _attributes(value: object) -> dict[str, object]:
    return object.__getattribute__(value, "__dict__")


def _unwrapped(value: object) -> object:
    """What a method, a partial call or decorations lead to."""
    seen = set()
    while id(value) not in seen:
        seen.add(id(value))
        kind = type(value)
        is_partial = issubclass(kind, functools.partial)
        if (kind is FunctionType or is_partial) and "__wrapped__" in _attributes(value):
            value = _attributes(value)["__wrapped__"]
        elif kind is MethodType or issubclass(kind, (staticmethod, classmethod)):
            value = object.__getattribute__(value, "__func__")
        elif is_partial:
            value = object.__getattribute__(value, "func")
    return value


def _is_attention(value: object) -> bool:
    return value is _ATTENTION or (issubclass(type(value), torch.jit.ScriptFunction) and _is_in_graph(value))


def _is_readable(value: object) -> bool:
    return type(value) is FunctionType and str(value.__module__).partition(".")[0] not in _FOREIGN


def _values(
    function: FunctionType, code: CodeType, cls: type | None, own_name: str | None
) -> Iterator[tuple[object, int]]:
    """What the code's dotted names mean, as far as that is known without running it, and in which line each stands.

    ``own_name`` is the variable that holds an instance of ``cls``.
    """
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: cell for name, cell in cells if name in code.co_freevars}
    value, line = _UNKNOWN, code.co_firstlineno
    for instruction in dis.get_instructions(code):
        starts = getattr(instruction, "line_number", instruction.starts_line)  # of Python 3.13, of those before
        line = starts or line
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = dict.get(function.__globals__, name, _UNKNOWN)
        elif operation == "LOAD_DEREF" or operation.startswith("LOAD_FAST"):
            last = name[-1] if isinstance(name, tuple) else name  # one instruction may load two
            value = _Instance(cls) if own_name is not None and last == own_name else _content(closure.get(last))
        elif operation == "IMPORT_NAME":
            value = _loaded(name)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            value = _attribute(value, name)
        else:
            if operation not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL"):
                value = _UNKNOWN
            continue
        if value is not _UNKNOWN:
            yield value, line
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension, a lambda
            yield from _values(function, constant, cls, own_name if own_name in constant.co_freevars else None)


def _content(cell) -> object:
    try:
        return _UNKNOWN if cell is None else cell.cell_contents
    except ValueError:  # not filled yet
        return _UNKNOWN


def _loaded(name: str) -> object:
    return sys.modules.get(name, _UNKNOWN)


def _attribute(value: object, name: str) -> object:
    """Without the hooks of modules and classes, which may import or compute."""
    if issubclass(type(value), ModuleType):
        return _attributes(value).get(name, _UNKNOWN)
    cls = value.cls if type(value) is _Instance else value
    return inspect.getattr_static(cls, name, _UNKNOWN) if issubclass(type(cls), type) else _UNKNOWN


def _is_in_graph(scripted: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> bool:
    if getattr(scripted, "original_name", "") == nn.MultiheadAttention.__name__:
        return False
    try:
        return scripted.graph.findNode(_GRAPH_NODE) is not None
    except (AttributeError, RuntimeError):  # a module without a forward
        return False
