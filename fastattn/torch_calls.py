"""Where the modules of a model call torch's scaled_dot_product_attention themselves, by the code of their forwards.

Nothing is run, and nothing is imported: names are looked up in what is loaded. So a call is found that reaches torch's
function by a name of its module or by an attribute of a module, in a forward, in a method of its class, or in functions
that these call; not one through an object, a table or an argument.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch
from torch import nn

_ATTENTION = torch._C._nn.scaled_dot_product_attention
_GRAPH_NODE = "aten::scaled_dot_product_attention"
#: How many functions deep a call is looked for.
_DEPTH = 4
_UNKNOWN = object()
#: Packages whose functions are not looked into: what they call is their own affair.
_FOREIGN = ("torch", "fastattn")


class _Instance:
    """Stands for ``self``, of a known class."""

    def __init__(self, cls: type) -> None:
        self.cls = cls


def attention_calls(model: nn.Module) -> dict[str, str]:
    """For each module that calls torch's function itself, by name, where: "file:line"."""
    found, known = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = "compiled by torch.jit" if _is_in_graph(module) else None
        else:
            forward = vars(module).get("forward", type(module).forward)
            key = type(module), id(getattr(forward, "__func__", forward))
            if key not in known:
                known[key] = _place_in_module(module, forward)
            place = known[key]
        if place is not None:
            found[name] = place
    return found


def _place_in_module(module: nn.Module, forward) -> str | None:
    cls = type(module)
    for function in (_function(forward), *_inherited_forwards(cls)):
        place = None if function is None else _place(function, cls, _DEPTH, set())
        if place is not None:
            return place
        if function is None or "super" not in function.__code__.co_names:
            return None
    return None


def _inherited_forwards(cls: type) -> Iterator[FunctionType | None]:
    defined = [vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base)]
    return map(_function, defined[1:])


def _function(value: object) -> FunctionType | None:
    """The function of Python code in a method, a partial call or decorations; None if it is none, or a foreign one."""
    while True:
        if isinstance(value, (FunctionType, functools.partial)) and "__wrapped__" in vars(value):
            value = value.__wrapped__
        elif isinstance(value, (staticmethod, classmethod)) or inspect.ismethod(value):
            value = value.__func__
        elif isinstance(value, functools.partial):
            value = value.func
        else:
            break
    if not isinstance(value, FunctionType):
        return None
    return None if str(value.__module__).partition(".")[0] in _FOREIGN else value


def _place(function: FunctionType, cls: type | None, depth: int, seen: set[CodeType]) -> str | None:
    """Where the function, a method of ``cls`` if that is given, or one that it calls, calls torch's."""
    if function.__code__ in seen:
        return None
    seen.add(function.__code__)
    called = []
    for value, line in _values(function, function.__code__, cls):
        if value is _ATTENTION or (isinstance(value, torch.jit.ScriptFunction) and _is_in_graph(value)):
            return f"{function.__code__.co_filename}:{line}"
        called.append(value)
    if depth == 0:
        return None
    for value in called:
        callee = _function(value)
        place = None if callee is None else _place(callee, cls, depth - 1, seen)
        if place is not None:
            return place
    return None


def _values(function: FunctionType, code: CodeType, cls: type | None) -> Iterator[tuple[object, int]]:
    """What the code's dotted names mean, as far as that is known without running it, and in which line each stands."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: cell for name, cell in cells if name in code.co_freevars}
    own_name = code.co_varnames[0] if cls is not None and code.co_argcount else None
    value, line = _UNKNOWN, code.co_firstlineno
    for instruction in dis.get_instructions(code):
        starts = getattr(instruction, "line_number", instruction.starts_line)  # of Python 3.13, of those before
        line = starts or line
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(name, _UNKNOWN)
        elif operation == "LOAD_DEREF":
            value = _content(closure.get(name))
        elif operation.startswith("LOAD_FAST"):
            last = name[-1] if isinstance(name, tuple) else name  # one instruction may load two
            value = _Instance(cls) if own_name is not None and last == own_name else _UNKNOWN
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
            yield from _values(function, constant, None)


def _content(cell) -> object:
    try:
        return _UNKNOWN if cell is None else cell.cell_contents
    except ValueError:  # not filled yet
        return _UNKNOWN


def _loaded(name: str) -> object:
    return sys.modules.get(name, _UNKNOWN)


def _attribute(value: object, name: str) -> object:
    """Without the hooks of modules and classes, which may import or compute."""
    if isinstance(value, ModuleType):
        return vars(value).get(name, _UNKNOWN)
    cls = value.cls if isinstance(value, _Instance) else value
    return inspect.getattr_static(cls, name, _UNKNOWN) if isinstance(cls, type) else _UNKNOWN


def _is_in_graph(scripted: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> bool:
    if getattr(scripted, "original_name", "") == nn.MultiheadAttention.__name__:
        return False
    try:
        return scripted.graph.findNode(_GRAPH_NODE) is not None
    except (AttributeError, RuntimeError):  # a module without a forward
        return False
