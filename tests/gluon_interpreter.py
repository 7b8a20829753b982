"""Gluon kernels in Triton's CPU interpreter: a stand-in for the part of gluon.language that our kernels use.

Layouts mean nothing to the interpreter, and shared memory is an array. Inline assembly is interpreted too, instruction by
instruction for all threads of a program (:class:`Assembly`), so that what waits on a GPU waits here, in a process for each
program (tests/forked.py). What cannot show here is a missing order among the threads of one program.

The stand-in is no better than the GPU: the product drops the bits that TF32 has not, and a NaN keeps its payload, which a
GPU's arithmetic would make canonical.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder, interpreter_semantic

PACKAGE = "fused_lstm.kernels"
# The kernels written in Gluon, in the order of their imports.
MODULES = ("fragments", "persistent_forward", "persistent_backward", "persistent_split", "persistent_local")
# Names that Triton and Gluon share, each doing the same in both.
CONSTANTS = ["constexpr", "float32", "int16", "int32", "int64", "uint64"]
FUNCTIONS = ["load", "store", "sum", "where", "expand_dims", "program_id"]
LAYOUTS = [
    "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "DistributedLinearLayout",
    "SwizzledSharedLayout",
]  # fmt: skip
NUMPY = {tl.float32: np.float32, tl.float16: np.float16, tl.bfloat16: np.uint16}


class Layout:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def tensor_of(array: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(TensorHandle(array, dtype), tl.block_type(dtype, list(array.shape)))


class Shared:
    """A descriptor of shared memory; its views share the array."""

    def __init__(self, array: np.ndarray, dtype: tl.dtype) -> None:
        self.array, self.dtype = array, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def store(self, value: tl.tensor) -> None:
        assert value.dtype == self.dtype, f"{value.dtype} into shared memory of {self.dtype}"
        assert tuple(value.shape) == self.array.shape, f"{value.shape} into shared memory of {self.array.shape}"
        self.array[...] = value.handle.data

    def load(self, _: Layout) -> tl.tensor:
        return tensor_of(self.array.copy(), self.dtype)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.array.shape[0], f"index {int(i)} of shared memory of {self.array.shape}"
        return Shared(self.array[int(i)], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.array.shape[dim]
        return Shared(self.array[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.array.transpose(order), self.dtype)


def allocate_shared_memory(dtype: tl.dtype, shape: Sequence[int], _: Layout) -> Shared:
    """Shared memory that holds NaN, so that an element nobody stored shows."""
    array = np.empty([int(n) for n in shape], NUMPY[dtype])
    array.view(np.uint8).fill(0xFF)
    return Shared(array, dtype)


def dropped(x: tl.tensor) -> np.ndarray:
    """An operand as the tensor cores see it, in fp32."""
    data = x.handle.data
    if x.dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    if x.dtype == tl.float16:
        return data.astype(np.float32)
    return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def mma_v2(a: tl.tensor, b: tl.tensor, acc: tl.tensor, input_precision: str | None = None) -> tl.tensor:
    assert a.dtype == b.dtype
    assert a.dtype != tl.float32 or input_precision == "tf32"
    with np.errstate(invalid="ignore", over="ignore"):
        return tensor_of(acc.handle.data + np.matmul(dropped(a), dropped(b)), tl.float32)


def to_threads(x: np.ndarray, pack: int) -> np.ndarray:
    """(threads, pack): the elements that each thread has, in the order of its registers.

    Eight at a time are those of an operand B (warps, 32, 8) with k_width = 4, as on a GPU (test_persistent_compile.py asks
    the compiler): the positions k % 16 // 4 of a thread, 4 from each half of the 32.
    """
    if pack == 1:
        return x.reshape(-1, 1)
    assert pack == 8
    assert x.shape[1:] == (32, 8)
    return x.reshape(-1, 2, 4, 4, 8).transpose(0, 2, 4, 1, 3).reshape(-1, 8)


def from_threads(x: np.ndarray, pack: int, shape: tuple[int, ...]) -> np.ndarray:
    if pack == 1:
        return x.reshape(shape)
    return x.reshape(-1, 4, 8, 2, 4).transpose(0, 3, 1, 4, 2).reshape(shape)


def inline_asm_elementwise(
    code: str, constraints: str, args: Sequence[tl.tensor], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """gluon's, by interpreting the code."""
    assert not is_pure
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    shape = np.broadcast_shapes(*(a.handle.data.shape for a in args))
    given = [to_threads(np.broadcast_to(a.handle.data, shape), pack) for a in args]
    threads = given[0].shape[0]
    width = [k.primitive_bitwidth * pack // 32 for k in kinds]  # registers of each result
    operands = constraints.split(",")
    outputs = sum(width)
    assert all(c in ("=&r", "=&f") for c in operands[:outputs]), "a result must not share an operand's register"
    registers = [np.zeros(threads, np.uint32) for _ in range(outputs)]
    for x in given:
        if x.itemsize == 2:
            x = np.ascontiguousarray(x).view(np.uint32)
        for column in x.T:
            word = column.copy().view(np.uint64 if x.itemsize == 8 else np.uint32)
            constraint = operands[len(registers)]
            if constraint.isdigit():  # the same register as a result
                registers[int(constraint)] = word
            else:
                assert constraint == {8: "l", 4: "r"}[word.itemsize], f"operand {len(registers)}: {constraint}"
            registers.append(word)
    assert len(registers) == len(operands), "constraints and operands differ in number"
    found = Assembly(code, registers).run()
    results, at = [], 0
    for kind, n in zip(kinds, width, strict=True):
        words = np.stack(found[at : at + n], 1)
        data = words.view({16: np.uint16, 32: np.uint32}[kind.primitive_bitwidth])
        data = from_threads(data, pack, shape)
        data = np.ascontiguousarray(data).view({tl.int32: np.int32, **NUMPY}[kind])
        results.append(tensor_of(data, kind))
        at += n
    return tuple(results) if isinstance(dtype, tuple) else results[0]


class Assembly:
    """A piece of PTX, run for all threads at once. ``$n`` are registers[n].

    A branch back is taken by the threads whose predicate says so; the others wait where the loop ends.
    """

    def __init__(self, code: str, registers: Sequence[np.ndarray]) -> None:
        self.named = {f"${n}": word for n, word in enumerate(registers)}
        self.results = len(registers)
        self.lines = [line.strip() for line in re.split(r"[\n]", code)]
        self.labels = {line[:-1]: n for n, line in enumerate(self.lines) if line.endswith(":")}
        self.threads = registers[0].shape[0]
        self.active = np.ones(self.threads, bool)

    def run(self) -> list[np.ndarray]:
        at, pause = 0, 5e-4
        while at < len(self.lines):
            line = self.lines[at]
            at += 1
            if line in ("{", "}", "") or line.startswith(".reg") or line.endswith(":"):
                continue
            assert line.endswith(";"), line
            line = line[:-1]
            if jump := re.fullmatch(r"@(\w+) bra (\w+)", line):
                taken = self.active & self.value(jump[1])
                if taken.any():
                    self.active, at = taken, self.labels[jump[2]]
                    time.sleep(pause)  # leave the processor to those that are waited for
                    pause = min(2 * pause, 8e-3)
                else:
                    self.active = np.ones(self.threads, bool)
            elif jump := re.fullmatch(r"bra.uni (\w+)", line):
                at = self.labels[jump[1]]
            else:
                self.execute(*line.split(" ", 1))
        return [self.named[f"${n}"] for n in range(self.results)]

    def value(self, name: str) -> Any:
        return self.named[name] if name in self.named else np.uint32(int(name, 0) & 0xFFFFFFFF)

    def put(self, name: str, value: Any) -> None:
        before = self.named.get(name, np.zeros(self.threads, value.dtype))
        self.named[name] = np.where(self.active, value, before)

    def execute(self, operation: str, rest: str) -> None:
        if operation.startswith("ld."):
            return self.load(operation, rest)
        if unpack := re.fullmatch(r"\{(\S+), (\S+)\}, (\S+)", rest):
            assert operation == "mov.b64"
            word = self.value(unpack[3])
            self.put(unpack[1], (word & np.uint64(0xFFFFFFFF)).astype(np.uint32))
            self.put(unpack[2], (word >> np.uint64(32)).astype(np.uint32))
            return None
        to, *names = rest.split(", ")
        values = [self.value(name) for name in names]
        values = [np.broadcast_to(v, self.threads) if v.ndim == 0 else v for v in values]
        self.put(to, OPERATIONS[operation](*values))
        return None

    def load(self, operation: str, rest: str) -> None:
        where = re.fullmatch(r"(.+), \[(\$\d+)(?:\+(\d+))?\]", rest)
        assert where
        names = where[1].strip("{}").split(",")
        kind, size = {
            "ld.relaxed.gpu.global.v4.b32": (tl.uint32, 4), "ld.relaxed.gpu.global.b64": (tl.uint64, 8)
        }[operation]  # fmt: skip
        first = self.value(where[2]) + np.uint64(where[3] or 0)
        assert (first[self.active] % np.uint64(size * len(names)) == 0).all(), "an address that is not aligned"
        address = first[:, None] + np.arange(len(names), dtype=np.uint64) * np.uint64(size)
        mask = np.broadcast_to(self.active[:, None], address.shape).copy()
        found = tl.load(tensor_of(address, tl.pointer_type(kind)), mask=tensor_of(mask, tl.int1)).handle.data
        for n, name in enumerate(names):
            self.put(name, found[:, n])


def halves(f: Callable) -> Callable:
    """An operation on 16-bit halves of 32-bit words."""
    return lambda a, b: f(a.copy().view(np.uint16), b.copy().view(np.uint16)).view(np.uint32)


OPERATIONS: dict[str, Callable] = {
    "mov.b32": lambda a: a.astype(np.uint32),
    "max.u32": np.maximum,
    "max.u16x2": halves(np.maximum),
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "sub.u32": np.subtract,
    "shr.u32": np.right_shift,
    "setp.eq.u32": np.equal,
    "setp.ne.u32": np.not_equal,
    "setp.ne.b32": np.not_equal,
    "setp.ne.or.b32": lambda a, b, p: (a != b) | p,
    "setp.ne.and.b32": lambda a, b, p: (a != b) & p,
}


def right_casts(cast: Callable) -> Callable:
    """The interpreter's conversions, but fp32 to bf16 to nearest even; a NaN keeps its upper bits."""

    def converted(src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = src.data.view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            bits = np.where(np.isnan(src.data), bits | np.uint32(0x10000), rounded)
            return TensorHandle((bits >> np.uint32(16)).astype(np.uint16), tl.bfloat16)
        return cast(src, dst_type)

    return converted


def late(name: str) -> Callable:
    """Triton's function as it is at the call: the interpreter replaces triton.language's functions while a kernel runs."""
    return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)


def language() -> types.ModuleType:
    """The stand-in for triton.experimental.gluon.language."""
    gl = types.ModuleType("triton.experimental.gluon.language")
    for name in CONSTANTS:
        setattr(gl, name, getattr(tl, name))
    for name in FUNCTIONS:
        setattr(gl, name, late(name))
    gl.static_range = range
    gl.to_tensor = interpreter_semantic.to_tensor
    gl.arange = lambda start, end, layout=None: tl.arange(start, end)
    gl.zeros = lambda shape, dtype, layout=None: tl.zeros(shape, dtype)
    gl.convert_layout = lambda x, layout: x
    gl.inline_asm_elementwise, gl.allocate_shared_memory = inline_asm_elementwise, allocate_shared_memory
    for name in LAYOUTS:
        setattr(gl, name, Layout)
    return gl


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within it, importing a module of kernels gives one that runs in the interpreter."""
    # the interpreter knows gl.constexpr as an annotation only under Triton's name
    triton.runtime.jit.type_canonicalisation_dict["gl.constexpr"] = "constexpr"
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = triton.jit, (lambda f: f), language()
    ampere = types.ModuleType("triton.experimental.gluon.language.nvidia.ampere")
    ampere.mma_v2 = mma_v2
    ours = {
        gluon.__name__: gluon, gluon.language.__name__: gluon.language,
        "triton.experimental.gluon.language.nvidia": types.ModuleType("nvidia"), ampere.__name__: ampere,
    }  # fmt: skip
    importlib.import_module(ampere.__name__)  # the real ones, to be put back
    before = {name: sys.modules[name] for name in ours}
    package, real = sys.modules["triton.experimental"], sys.modules[gluon.__name__]
    sys.modules |= ours
    package.gluon = gluon
    try:
        yield
    finally:
        sys.modules |= before
        package.gluon = real


@functools.cache
def interpreted() -> dict[str, types.ModuleType]:
    """The modules of kernels, by name, for the interpreter; whoever imports them elsewhere gets them as they are.

    Their functions are made ready to be interpreted here, once: else each of the processes that run them would do it.
    """
    names = [f"{PACKAGE}.{name}" for name in MODULES]
    package = importlib.import_module(PACKAGE)
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    attributes = {name: package.__dict__.pop(name) for name in MODULES if name in package.__dict__}
    try:
        with installed():
            found = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES}
    finally:
        for name in MODULES:
            sys.modules.pop(f"{PACKAGE}.{name}", None)
            package.__dict__.pop(name, None)
        sys.modules |= before
        package.__dict__.update(attributes)
    for module in found.values():
        module.tl = tl  # where the interpreter looks for it
    for value in [value for module in (*found.values(), tl.standard) for value in vars(module).values()]:
        if isinstance(value, InterpretedFunction):
            value.rewrite()
    return found


def prepare() -> None:
    """For the process that runs a kernel: mend the interpreter where it differs from a GPU."""
    builder, splat = interpreter_builder, interpreter_builder.create_splat
    builder.cast_impl = right_casts(builder.cast_impl)
    # it makes integers of a scalar condition that is combined with others
    builder.create_splat = lambda kind, x: TensorHandle(splat(kind, x).data.astype(x.data.dtype), x.dtype.scalar)
