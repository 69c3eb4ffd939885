"""A pretend CUDA device: CPU arithmetic behind tensors that say they are on cuda:0.

Finds tensors on the wrong device without a GPU, and counts what a real one would be asked for: waits of the host for
the device, copies of host data to it, kernels, and bytes that are alive.

    with Device() as device:
        model, inputs = device.move(model), device.put(inputs)
        with device.counting() as counts, prune(model, "fastv"):
            model.generate(**inputs)
    print(counts.syncs, counts.copies, counts.kernels, counts.peak_bytes, counts.places())

A wait: reading a value (`item`, `tolist`, `if tensor`), an output whose size depends on values (`nonzero`, a mask as
index, `unique`, `repeat_interleave` without `output_size`), a copy to the host without `non_blocking`, and
`torch.cuda.synchronize`. A copy: host data that becomes a tensor of the device, also as an index. A kernel: every
operator on the device that is no view and reserves no memory; fused attention is one. Bytes: storages that some tensor
of the device still holds.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
COPYING = (aten.copy_.default, aten._to_copy.default)
VALUES = (aten._local_scalar_dense.default, aten.equal.default)  # answers are Python's
SIZED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.isin.Tensor_Tensor,  # which sorts, and looks for what is unique
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._linalg_check_errors.default,
)
INDEXING = (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
IDLE = ("empty", "new_empty", "detach", "lift", "_unsafe_view")  # reserve memory, or are views by another name
MASKS = (torch.bool, torch.uint8)
SCALARS = (aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor)  # take a number of the host
FUSED = (nn.functional.scaled_dot_product_attention, nn.functional.linear)  # torch takes them apart as it likes
ROOTS = ("vtp_plugin", "llava", "transformers")


class OnDevice(Tensor):
    """A tensor that says it is on cuda:0; `inner` holds its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, owner: Device) -> OnDevice:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=CUDA)

    def __init__(self, inner: Tensor, owner: Device) -> None:
        self.inner, self.owner = inner, owner

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        self.owner.wait("tolist")
        return self.inner.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else str(self), spec)

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the pretend device, outside of `with Device()`")


@dataclass
class Counts:
    """What happened on the device while it was counted."""

    waits: Counter[str] = field(default_factory=Counter)  # by "what at file:line"
    copied: Counter[str] = field(default_factory=Counter)
    kernels: int = 0
    before_bytes: int = 0
    peak_bytes: int = 0
    after_bytes: int = 0
    left_bytes: int = 0  # once nobody holds what the call answered, though the garbage collector did not run

    @property
    def syncs(self) -> int:
        """How often the host waits for the device."""
        return sum(self.waits.values())

    @property
    def copies(self) -> int:
        """How often host data is copied to the device."""
        return sum(self.copied.values())

    def places(self) -> dict[str, int]:
        """Waits and copies by place, most first."""
        return dict((self.waits + self.copied).most_common())


class Device:
    """The pretend device; `with` makes it known to torch. Inside, "cuda" works; outside, its tensors are dead.

    `lazy`: weights and attention are not multiplied, so that a model's real width costs no more than its bytes. A
    linear layer answers the columns of its input, attention its values; everything else is computed.
    """

    def __init__(self, lazy: bool = False) -> None:
        self.counts, self.lazy = Counts(), lazy
        self.live_bytes = 0
        self._holders: Counter[int] = Counter()  # storage -> tensors of the device that hold it
        self._stack = ExitStack()

    def __enter__(self) -> Device:
        torch._C._ensureCUDADeviceGuardSet()  # where there is no driver; as torch's own fake tensors do
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is built on the CPU and moved
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        for name, value in self._replaced().items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _replaced(self) -> dict[str, Callable[..., Any]]:
        return {
            "_lazy_init": lambda: None,
            "synchronize": lambda *_, **__: self.wait("synchronize"),
            "reset_peak_memory_stats": lambda *_, **__: setattr(self.counts, "peak_bytes", self.live_bytes),
            "max_memory_allocated": lambda *_, **__: self.counts.peak_bytes,
            "get_device_capability": lambda *_: (9, 0),
            "memory_allocated": lambda *_, **__: self.live_bytes,
        }

    # -- for tests --------------------------------------------------------------------------------------------------

    def put(self, values: Any) -> Any:
        """The same nested values with every tensor on the device."""
        return tree_map_only(Tensor, lambda t: t if isinstance(t, OnDevice) else self.hold(t.clone()), values)

    def move(self, model: nn.Module) -> nn.Module:
        """The same model, its weights and buffers on the device from now on; tied weights stay tied."""
        done: dict[int, Tensor] = {}
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    made = done.get(id(weight))
                    done[id(weight)] = made = nn.Parameter(self.hold(weight.data), False) if made is None else made
                    module._parameters[name] = made
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.hold(buffer)
        return model

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count from here to the end of the block."""
        outer, self.counts = self.counts, Counts(before_bytes=self.live_bytes, peak_bytes=self.live_bytes)
        try:
            yield self.counts
        finally:
            self.counts.after_bytes, self.counts = self.live_bytes, outer

    # -- for the modes ----------------------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        self.counts.waits[f"{what} at {place()}"] += 1

    def copy(self, what: str) -> None:
        self.counts.copied[f"{what} at {place()}"] += 1

    def hold(self, inner: Tensor) -> OnDevice:
        """A tensor of the device with these values; its storage is alive as long as some such tensor is."""
        held, storage = OnDevice(inner, self), inner.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not self._holders[key]:
            self.live_bytes += size
            self.counts.peak_bytes = max(self.counts.peak_bytes, self.live_bytes)
        self._holders[key] += 1
        weakref.finalize(held, self._release, key, size).atexit = False
        return held

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live_bytes -= size


def place() -> str:
    """The innermost line of this package or of a host that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in ROOTS:
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "the caller"


class _Functions(TorchFunctionMode):
    """`torch.tensor`, which reads tensors inside lists without asking an operator, and fused kernels."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            return self._tensor(*args, **kwargs)
        if func in FUSED and isinstance(args[0], OnDevice):
            return self._fused(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _fused(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As one kernel; attention by torch's own formula, because the choice of a kernel would ask a real device."""
        if any(isinstance(t, Tensor) and not isinstance(t, OnDevice) for t in (*args, *kwargs.values())):
            raise RuntimeError(f"Expected all tensors to be on the same device ({func.__name__} at {place()})")
        self.device.counts.kernels += 1
        given, named = tuple(map(_inner, args)), {name: _inner(value) for name, value in kwargs.items()}
        if self.device.lazy:
            return self.device.hold(_unmultiplied(*given))
        with sdpa_kernel(SDPBackend.MATH):
            return self.device.hold(func(*given, **named))

    def _tensor(self, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """Numbers, and tensors of numbers, whose values are read one by one; then one copy to the device."""
        if isinstance(data, Tensor):
            kwargs, device = {"dtype": data.dtype} | kwargs, device or data.device
        if device is None or torch.device(device).type != "cuda":
            return torch.tensor(_plain(data), device=device, **kwargs)
        made = self.device.hold(torch.tensor(_plain(data), **kwargs))
        self.device.copy("torch.tensor")
        return made


def _unmultiplied(first: Tensor, second: Tensor, *rest: Any) -> Tensor:
    """Of the shape that a linear layer [..., I] x [O, I], or attention [B, H, Q, d] x [B, Hkv, L, d], answers."""
    if second.ndim == 2:
        out, width = first.new_empty(*first.shape[:-1], len(second)), first.shape[-1]
        for start in range(0, len(second), width):
            out[..., start : start + width] = first[..., : len(second) - start]
        return out
    values = rest[0][:, :, -first.shape[2] :]
    return values.repeat_interleave(first.shape[1] // values.shape[1], dim=1).contiguous()


def _plain(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.item() if data.ndim == 0 else data.tolist()
    return [_plain(value) for value in data] if isinstance(data, (list, tuple)) else data


class _Operators(TorchDispatchMode):
    """Every operator: is it allowed, what does it cost, and where are its results?"""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _Operation(func, args, dict(kwargs or {}))
        if not call.touches_device:
            return func(*args, **kwargs or {})
        call.refuse()
        self._count(call)
        out = call.run()
        if func in VALUES:
            return out
        known = {id(t.inner if isinstance(t, OnDevice) else t): t for t in call.tensors}  # changed in place
        if isinstance(out, Tensor):
            return self._placed(out, known, call.target)
        return tree_map_only(Tensor, lambda t: self._placed(t, known, call.target), out)

    def _placed(self, value: Tensor, known: dict[int, Tensor], target: str) -> Tensor:
        if id(value) in known:
            return known[id(value)]
        return self.device.hold(value) if target == "cuda" else value

    def _count(self, call: _Operation) -> None:
        name = call.func.__name__
        if call.waits:
            self.device.wait(name)
        for _ in range(call.copies):
            self.device.copy(name)
        self.device.counts.kernels += _launches(call.func) and call.target == "cuda"


class _Operation:
    """One operator with its arguments, some of them on the device."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]
        self.held = [t for t in self.tensors if isinstance(t, OnDevice)]
        self.host = [t for t in self.tensors if not isinstance(t, OnDevice)]
        wanted = kwargs.get("device")
        self.target = torch.device(wanted).type if wanted is not None else "cuda" if self.held else "cpu"

    @property
    def touches_device(self) -> bool:
        return bool(self.held) or self.target == "cuda"

    def run(self) -> Any:
        args, kwargs = _inner(self.args), {name: _inner(value) for name, value in self.kwargs.items()}
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if torch.Tag.inplace_view in self.func.tags:  # the shape of the tensor itself changes, too
            with no_dispatch():
                self.func(*self.args, **self.kwargs)
        if self.func is aten.histc.default and not args[0].is_floating_point():  # which the CPU has for floats only
            return self.func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        return self.func(*args, **kwargs)

    # -- what a real device would refuse ----------------------------------------------------------------------------

    def refuse(self) -> None:
        """Raise what torch raises for tensors, or a generator, on another device."""
        generator = self.kwargs.get("generator")
        if generator is not None and self.target == "cuda" and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if self.held and any(not self._allowed(t) for t in self.host):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({self.func} at {place()})"
            )

    def _allowed(self, host: Tensor) -> bool:
        """Whether a tensor of the host may stand among the arguments."""
        if self.func in COPYING:
            return True
        if self.func in INDEXING:
            return isinstance(self.args[0], OnDevice) and (host.ndim == 0 or self._is_index(host))
        number = host.ndim == 0 and not (self.func._schema.is_mutable and self.args[0] is host)
        return number and (torch.Tag.pointwise in self.func.tags or self.func in SCALARS)

    def _is_index(self, tensor: Tensor) -> bool:
        return any(index is tensor for index in self.args[1])

    # -- what it costs ----------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the host needs something from the device before it can go on."""
        if self.func in COPYING:
            return self._to_host and not self._non_blocking
        if self.func in INDEXING:
            return any(
                isinstance(index, OnDevice) and index.dtype in (torch.bool, torch.uint8) for index in self.args[1]
            )
        if self.func is aten.repeat_interleave.Tensor:
            return self.kwargs.get("output_size") is None
        return bool(self.held) and self.func in VALUES + SIZED_BY_VALUES

    @property
    def copies(self) -> int:
        """Tensors of the host that are copied to the device."""
        if self.func is aten._to_copy.default:
            return int(not self.held)
        if self.func is aten.copy_.default:
            return int(bool(self.host) and isinstance(self.args[0], OnDevice))
        return len(self.host) if self.func in (*INDEXING, aten.where.self) else 0

    @property
    def _to_host(self) -> bool:
        return bool(self.held) and (self.target != "cuda" or not isinstance(self.args[0], OnDevice))

    @property
    def _non_blocking(self) -> bool:
        return bool(self.kwargs.get("non_blocking", len(self.args) > 2 and self.args[2]))


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments of an operator, lists opened. (torch's own trees cost more than the operators of tiny models.)"""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _inner(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value


@cache
def _launches(func: Any) -> bool:
    """Whether an operator runs a kernel: it is no view, does not only reserve memory, and gives back no number."""
    name = func._schema.name
    return not (func.is_view or func in VALUES or name.removeprefix("aten::").startswith(IDLE))
