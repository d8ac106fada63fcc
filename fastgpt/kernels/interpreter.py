"""Corrections to Triton's CPU interpreter, and what makes it faster.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, kernels run on CPU tensors, one program after
another, in NumPy. Three things in it are wrong:

* bfloat16. NumPy has none, so the interpreter keeps the raw 16 bits and computes *on the bit patterns*
  (triton-lang/triton#4972). ``install`` makes casts, dots and arithmetic go through fp32 with round-to-nearest-even.
  Reductions of bf16 stay wrong: kernels upcast right after every load, which they want to do anyway.
* fp8. Casts to it truncate, and NaN comes back as a number. ``install`` makes casts between fp8 and fp32, and dots, do what
  the chip does: to nearest even, saturating, inf too; NaN stays NaN.
* A comparison keeps the dtype of what it compares. Spread over a block, as in ``mask & (tl.program_id(1) == 0)``, it becomes
  integers, which triton 3.9 refuses as a mask. ``install`` spreads what is true or false as such.

Four things are slow. At each launch, and at each call of a jitted function in it, it rebinds all of ``triton.language``, whose
members it looks through each time; ``install`` has them looked through once, and rebound once per launch. It computes whether
integers overflow, in 64 bits, and then looks at the result in its debug mode alone. It makes a table of dtypes whenever it
looks one up. Each operation makes types of blocks, checks and names them, and wraps the numbers of their shapes; ``install``
does this once per shape, and passes over checks of two operands that are of one type. Without these a training step on small
tensors takes four times as long.

None of this concerns compiled kernels.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any


def install() -> None:
    """Make bf16, fp8 and masks right in the interpreter; idempotent. Called when fastgpt.kernels is imported under
    TRITON_INTERPRET=1."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_fastgpt_bf16", False):
        return

    def is_bf16(handle: TensorHandle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}  # kept as raw bytes

    def to_fp32(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar in fp8:
            values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(fp8[handle.dtype.scalar])
            return TensorHandle(values.float().numpy(), tl.float32)
        if not is_bf16(handle):
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def to_bf16(values: np.ndarray) -> TensorHandle:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)

    def to_fp8(values: np.ndarray, target: tl.dtype) -> TensorHandle:
        largest = torch.finfo(fp8[target]).max
        wide = torch.from_numpy(np.ascontiguousarray(values, np.float32)).clamp(-largest, largest)
        return TensorHandle(wide.to(fp8[target]).view(torch.uint8).numpy(), target)

    stock_cast, stock_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    stock_splat = InterpreterBuilder.create_splat

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return stock_cast(self, src, dst_type)
        wide = to_fp32(src)
        if target == tl.bfloat16:
            return to_bf16(wide.data.astype(np.float32))
        return wide if target == tl.float32 else stock_cast(self, wide, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):  # casts from and to fp8
        wide = to_fp32(src)
        return to_fp8(wide.data, dst_type.scalar) if dst_type.scalar in fp8 else cast_impl(self, wide, dst_type)

    def create_dot(self, a, b, acc, *rest):
        return stock_dot(self, to_fp32(a), to_fp32(b), acc, *rest)

    def create_splat(self, type, scalar):
        return stock_splat(self, type, TensorHandle(scalar.data, tl.int1) if scalar.data.dtype == np.bool_ else scalar)

    def through_fp32(stock):
        def op(self, *args):
            *handles, function = args
            if not is_bf16(handles[0]):
                return stock(self, *args)
            result = function(*[to_fp32(handle).data for handle in handles])
            return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else to_bf16(result)

        return op

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.create_splat = create_splat
    InterpreterBuilder.binary_op = through_fp32(InterpreterBuilder.binary_op)
    InterpreterBuilder.unary_op = through_fp32(InterpreterBuilder.unary_op)
    _make_faster()
    InterpreterBuilder._fastgpt_bf16 = True


def _make_faster() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    class Rebound:
        """Has an attribute for each module or class that is rebound now."""

    packages = tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base
    names = {
        id(each): [name for name, member in inspect.getmembers(each) if tl.core.is_builtin(member)] for each in packages
    }

    def once(rebind: Any) -> Any:
        def rebind_once(package: Any, *args: Any) -> None:
            mark = f"{rebind.__name__}_{id(package)}"
            if not hasattr(Rebound, mark):
                rebind(package, *args)
                args[-1].set_attr(
                    Rebound, mark, True
                )  # the scope: it takes this back together with what it has rebound

        return rebind_once

    def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names[id(package)]:
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    def _patch_lang(function: Any) -> Any:
        mark, nothing = f"globals_{id(function.__globals__)}", interpreter._LangPatchScope()
        if hasattr(Rebound, mark):
            return nothing
        scope, launch = patch_lang(function), getattr(Rebound, "launch", None)
        scope.set_attr(Rebound, mark, True)
        if launch is None:
            scope.set_attr(Rebound, "launch", scope)
            return scope
        launch._changes += scope._changes  # a call within a launch, which takes this back at its end
        return nothing

    patch_lang, interpreter._patch_lang = interpreter._patch_lang, _patch_lang
    interpreter._patch_builtin = once(_patch_builtin)
    interpreter._patch_lang_tensor = once(interpreter._patch_lang_tensor)

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

    numpy_dtype, known = interpreter._get_np_dtype, {}

    def _get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = _get_np_dtype
    _make_types_once()


def _make_types_once() -> None:
    """One shape object for all blocks of a shape, in integers for their types and in constexprs for their tensors."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    constexpr, block_type, tensor = tl.constexpr, tl.core.block_type, tl.tensor
    stock_init, stock_broadcast = block_type.__init__, TritonSemantic.broadcast_impl_value
    stock_check = TritonSemantic.binary_op_type_checking_impl
    known: dict[tuple[int, ...], tuple[Any, ...]] = {}
    interned: dict[int, tuple[Any, ...]] = {}  # by the id of the shape object
    scalars = tl.core.tuple([]), constexpr(1)

    def init_block(self, element_ty, shape):
        found = interned.get(id(shape))
        if found is None:
            sizes = tuple([size.value if isinstance(size, constexpr) else size for size in shape])
            found = None if any(type(size) is not int for size in sizes) else known.get(sizes)
        if found is None:
            stock_init(self, element_ty, shape)  # refuses what is no shape
            wrapped = tl.core.tuple([constexpr(size) for size in sizes]), constexpr(self.numel)
            found = known[sizes] = interned[id(self.shape)] = self.shape, self.numel, str(self.shape), wrapped
        self.element_ty = element_ty
        self.shape, self.numel, name, self.wrapped = found
        self.name = f"<{name}, {element_ty}>"

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.wrapped if type.is_block() else scalars

    def broadcast(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if same else stock_broadcast(self, lhs, rhs)

    def check(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if isinstance(lhs, tensor) and isinstance(rhs, tensor) and not div_or_mod:
            a, b = lhs.dtype, rhs.dtype
            if (a is b or a == b) and not a.is_ptr():
                return broadcast(self, lhs, rhs)
        return stock_check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    block_type.__init__, tensor.__init__ = init_block, init_tensor
    TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl = broadcast, check
