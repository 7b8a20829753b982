"""Triton's interpreter, without what it does over and over again: more than half of its time.

Values, types and errors are the interpreter's own. It also works out whether sums and products of int32 overflow, and makes
nothing of it: that is left to test_bounds.py, which has it raise an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang, _np_dtype, _broadcast = interpreter._patch_lang, interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
_block_type, _tensor, _equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
_unwrap, _wrapped = core._unwrap_if_constexpr, (core.constexpr, core.tuple, list, tuple)
_languages: dict[str, list[ModuleType]] = {}
_blocks: dict[tuple, dict[str, Any]] = {}
_tensors: dict[str, dict[str, Any]] = {}
_np_dtypes: dict[str, Any] = {}


def patch_lang(fn: Callable) -> Any:
    """The language is made over for each function that a kernel calls; here for the kernel alone."""
    if fn.__module__ not in _languages:
        _languages[fn.__module__] = [v for v in fn.__globals__.values() if v is core or v is interpreter.tl]
    found = _languages[fn.__module__]
    done = found and not any(core.is_builtin(language.load) for language in found)
    return interpreter._LangPatchScope() if done else _patch_lang(fn)


@cache
def builtins_of(place: Any) -> list[tuple[str, Callable]]:
    """What the interpreter calls in place of the builtins of a module or class."""

    def interpreted(member: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        return call

    return [(name, interpreted(member)) for name, member in inspect.getmembers(place) if core.is_builtin(member)]


def patch_builtin(place: Any, _: Any, scope: Any) -> None:
    for name, member in builtins_of(place):
        scope.set_attr(place, name, member)


def block_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
    """A type is checked and named once, as long as there are others like it."""
    key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
    if key not in _blocks:
        _block_type(self, element_ty, shape)
        _blocks[key] = self.__dict__.copy()
    self.__dict__.update(_blocks[key])


def tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
    """What a value has of its type is made once for the type."""
    if type.name not in _tensors:
        _tensor(self, handle, type)
        _tensors[type.name] = self.__dict__.copy()
    self.__dict__.update(_tensors[type.name])
    self.handle = handle


def np_dtype(type: core.dtype) -> Any:
    if type.name not in _np_dtypes:
        _np_dtypes[type.name] = _np_dtype(type)
    return _np_dtypes[type.name]


def broadcast(self: TritonSemantic, lhs: core.tensor, rhs: core.tensor) -> tuple[core.tensor, core.tensor]:
    """Two blocks of one shape, and two scalars, stay as they are."""
    alike = lhs.handle.data.shape == rhs.handle.data.shape and lhs.type.is_block() == rhs.type.is_block()
    return (lhs, rhs) if alike else _broadcast(self, lhs, rhs)


def install() -> None:
    interpreter._patch_lang, interpreter._patch_builtin, interpreter._get_np_dtype = patch_lang, patch_builtin, np_dtype
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.block_type.to_ir = lambda self, _: self  # as the interpreter's builder has it
    core.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
    core._unwrap_if_constexpr = lambda value: _unwrap(value) if isinstance(value, _wrapped) else value
    TritonSemantic.broadcast_impl_value = broadcast
    check_overflow(False)


def check_overflow(on: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=on, debug=on)
