"""A double for CUDA: tensors that report to be on a GPU, and the device mistakes that only a GPU would show.

A `CudaTensor` has its values on the CPU, which does its arithmetic; above autograd (`__torch_function__`) it is on
`cuda:0`. Within `with CudaDouble() as card:` every request for a CUDA device gets one (`.to("cuda")`, `.cuda()`,
`torch.zeros(..., device="cuda")`, `Trainer(**card.trainer())`), and

- what CUDA refuses raises `DeviceError`, with operation and line: tensors of both devices in one operation (a scalar
  tensor of the CPU may take part; indices and `copy_` are copied), `.numpy()`, a generator of the CPU. Reading a tensor
  that is still being copied to the host is refused, too: CUDA would return arbitrary values;
- `torch.autocast("cuda")` casts as CUDA does, by the lists in PyTorch's own header;
- `card.syncs` holds every wait of the host for the device, with the line that caused it.

The waits are what `torch.cuda.set_sync_debug_mode` reports (tests/test_cuda_double.py compares, where there is a GPU):

- a value becomes Python's: `item`, `tolist`, `bool`, `int`, `float`, an index, a slice's end, `in`, `equal`, printing;
- a size depends on values: `nonzero`, `unique`, `masked_select`, `bincount`, `repeat_interleave` by a tensor, an index
  that is a mask, and its gradient once more. Filling by a mask with a number does not wait (`masked_fill`);
- `multinomial`, and the functions of `torch.linalg` that check whether they failed;
- a copy between host and device, also by `copy_`, by `tensor` and of indices on the host, unless it is `non_blocking`.
  A copy to the device from memory that is not pinned always waits, which PyTorch does not report. Waiting for an
  event (`torch.cuda.Event`) is not recorded: the event may long be done.
"""

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

# Names of functions, methods and operators.
TENSORLESS = {"device", "_parse_to", "_set_grad_enabled"}  # these concern no tensor
METADATA = {"dim", "size", "numel", "__len__", "stride", "is_contiguous"}
REPORTED = {"device": CUDA, "is_cuda": True, "is_cpu": False}
MOVES = {"to", "cuda", "cpu", "type_as"}
FROM_DATA = {"tensor", "as_tensor", "asarray", "new_tensor"}
ACCEPTS_BOTH_DEVICES = FROM_DATA | {
    "copy_", "data.__set__", "view_as", "expand_as", "reshape_as", "_has_compatible_shallow_copy_type",
}  # fmt: skip
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
AUGMENTED = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
REFUSES_SCALARS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "index_select", "gather", "embedding"}
SYNCHRONIZING = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "__contains__", "__repr__",
    "__format__", "__reduce_ex__", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
    "equal", "allclose", "multinomial", "linalg_cholesky", "linalg_inv", "linalg_eigh", "linalg_solve", "linalg_svd",
}  # fmt: skip

# The operators by how CUDA's autocast treats them; added to them below are functions that are composed of these.
POLICIES = {
    name: set(re.findall(r"_\((?:ADD_NS\()?(\w+)", text.partition("\n\n")[0]))
    for name, text in re.findall(
        r"define AT_FORALL_(\w+)\(_\)(.+?\n\n)",
        (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text(),
        re.DOTALL,
    )
}
LOWER_PRECISION = POLICIES["LOWER_PRECISION_FP"] | {"__matmul__", "__rmatmul__", "multi_dot"}
FLOAT32 = POLICIES["FP32"] | {
    "__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "square", "cross_entropy", "normalize", "interpolate", "norm",
    "linalg_norm",
}  # fmt: skip
FLOAT32_UNLESS_TOLD = POLICIES["FP32_SET_OPT_DTYPE"]
WIDEST = POLICIES["PROMOTE"]
KEEPS_TYPE = {"dropout", "embedding", "pad"}


class DeviceError(RuntimeError):
    """Operation that CUDA refuses."""


class Sync(NamedTuple):
    """Wait of the host for the device."""

    where: str  # the function: its name within this project, else "package: name"
    line: str  # "file:number: text"
    operation: str


class CudaTensor(Tensor):
    """Tensor of the CPU that reports to be on `cuda:0`."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class CudaDouble(TorchFunctionMode):
    """Computer with one GPU, as a context.

    Attributes:
        syncs: waits of the host for the device, in order.
        arriving: tensors that are being copied to the host.
    """

    current: "CudaDouble | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[Sync] = []
        self.arriving: list[Tensor] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __enter__(self) -> Self:
        self._patches = ExitStack()
        stream = mock.Mock(is_capturing=lambda: False)
        for name, value in (
            ("cuda.is_available", lambda: True), ("cuda.is_bf16_supported", lambda: True), ("cuda.Event", Event),
            ("cuda.get_device_name", lambda device=None: "a double"), ("backends.cudnn.version", lambda: None),
            ("cuda.get_rng_state_all", list), ("cuda.synchronize", lambda device=None: _record_wait("synchronize")),
            ("accelerator.is_available", lambda: True), ("accelerator.current_stream", lambda device=None: stream),
        ):  # fmt: skip
            self._patches.enter_context(mock.patch(f"torch.{name}", value))
        self._patches.enter_context(mock.patch.object(CudaDouble, "current", self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def trainer(self) -> dict[str, Any]:
        """Return the arguments of a Trainer on this GPU."""
        return {"accelerator": "auto", "devices": 1, "strategy": SingleDeviceStrategy(CUDA, CudaAccelerator())}


class CudaAccelerator(CPUAccelerator):
    """Lightning's view of the GPU."""

    def setup_device(self, device: torch.device) -> None:
        """Do nothing: there is no driver."""


class Event:
    """`torch.cuda.Event` of the only stream."""

    def __init__(self, **_: bool) -> None:
        self._arriving: list[Tensor] = []

    def record(self, stream: Any = None) -> None:
        if CudaDouble.current is not None:
            self._arriving = [*CudaDouble.current.arriving]

    def synchronize(self) -> None:
        _complete_copies(self._arriving)

    def query(self) -> bool:
        self.synchronize()
        return True


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of torch on the CPU, and behave as CUDA would."""
    name, first = func.__name__, args[0] if args else None
    if name in TENSORLESS:
        return func(*args, **kwargs)
    if name == "__get__":
        return _get_attribute(func, first)
    if name == "__set__":
        name = f"{func.__self__.__name__}.__set__"  # type: ignore[attr-defined]
    tensors = [*_find_tensors(args), *_find_tensors(kwargs)]
    doubles = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    if (in_transit := [tensor for tensor in tensors if getattr(tensor, "arriving", False)]) and name not in METADATA:
        raise DeviceError(
            f"{name} of {tuple(in_transit[0].shape)}, still on its way to the host, at {_find_caller().line}"
        )
    device = next((value for value in args if isinstance(value, torch.device)), kwargs.get("device"))
    if name in MOVES or (name in ("as_tensor", "asarray") and isinstance(first, Tensor) and device is not None):
        return _move(name, *args, **kwargs)
    to_cuda = device is not None and torch.device(device).type == "cuda"
    if not (doubles or to_cuda):
        return _pin(name, first) if name in ("pin_memory", "is_pinned") else func(*args, **kwargs)
    if isinstance(first, CudaTensor) and (answer := _report(name, first, args)) is not None:
        return answer
    _refuse_invalid(name, first, args, kwargs, tensors)
    _record_waits(name, first, args, kwargs)
    indexed = [first, *args[2:3]] if name in INDEXING else []
    gradients = sum(isinstance(part, Tensor) and part.requires_grad for part in indexed)
    args = tuple(CPU if isinstance(value, torch.device) else value for value in args)
    kwargs = kwargs if device is None else {**kwargs, "device": CPU}
    no_cpu_autocast = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with torch._C.DisableTorchFunctionSubclass(), no_cpu_autocast:
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _cast(func, name, args, kwargs)
        result = func(*args, **kwargs)
    if name == "data.__set__":
        _convert_like(first, args[1])
    if gradients:
        _record_gradient_waits(first if result is None else result, args[1], gradients)
    stays_on_cpu = name in FROM_DATA and not isinstance(first, CudaTensor) if device is None else not to_cuda
    return result if stays_on_cpu or _is_in_place(name) else _to_double(result)


def _get_attribute(func: Callable[..., Any], tensor: Any) -> Any:
    """Return an attribute of a tensor."""
    if not isinstance(tensor, CudaTensor):
        return func(tensor)
    name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass():
        return REPORTED[name] if name in REPORTED else _to_double(func(tensor))


def _report(name: str, tensor: Tensor, args: Any) -> Any:
    """Return what a double reports of itself as a Python object; None where that has to be computed."""
    if name in ("numpy", "__array__"):
        raise DeviceError(f"{name} of a tensor on {CUDA}, at {_find_caller().line}: take .cpu() of it before")
    if name == "type" and len(args) == 1:
        return _to_plain(tensor).type().replace("torch.", "torch.cuda.")
    if name == "__deepcopy__":
        return _convert_like(_to_plain(tensor).clone().detach().requires_grad_(tensor.requires_grad), tensor)
    if name in ("__reduce_ex__", "__repr__", "__format__"):
        _record_wait(name)
        return getattr(_to_plain(tensor), name)(*args[1:])
    return 0 if name == "get_device" else None


def _pin(name: str, tensor: Tensor) -> Any:
    """Pin a tensor of the host, or return whether it is pinned."""
    if name == "is_pinned":
        return hasattr(tensor, "pinned")
    pinned = tensor.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _move(name: str, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a function that may copy a tensor to another device."""
    other = kwargs.pop("other", args[0] if args else None)
    if isinstance(other, Tensor):
        args = (other.device, other.dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    if name in ("cuda", "cpu"):
        kwargs.pop("device", None)
        args = (CUDA if name == "cuda" else CPU, None, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    from_cuda = isinstance(source, CudaTensor)
    to_cuda = from_cuda if device is None else device.type == "cuda"
    with torch._C.DisableTorchFunctionSubclass():
        place = CPU if from_cuda or to_cuda else device or source.device
        layout = layout or torch.preserve_format
        moved = source.to(place, dtype or source.dtype, copy=copy or from_cuda != to_cuda, memory_format=layout)
    _record_copy(source, from_cuda, moved, to_cuda, non_blocking)
    return _to_double(moved) if to_cuda else moved


def _record_copy(source: Tensor, from_cuda: bool, target: Tensor, to_cuda: bool, non_blocking: bool) -> None:
    """Record whether the host waits for a copy, or that it completes later."""
    if from_cuda == to_cuda:
        return
    if not non_blocking:
        _record_wait(f"a copy to the {'device' if to_cuda else 'host'}")
    elif to_cuda and not hasattr(source, "pinned"):
        _record_wait("a copy to the device from memory that is not pinned")
    elif from_cuda and CudaDouble.current is not None:
        target.arriving = True  # type: ignore[attr-defined]
        CudaDouble.current.arriving.append(target)


def _refuse_invalid(name: str, first: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses."""
    hosts = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if name in INDEXING and isinstance(first, CudaTensor):
        by_tensor = isinstance(args[1], list) or any(True for _ in _find_tensors(args[1]))
        hosts = [value for value in args[2:] if by_tensor and type(value) is Tensor]
    elif name in ACCEPTS_BOTH_DEVICES:
        hosts = []
    if any(tensor.dim() or name in REFUSES_SCALARS or (tensor is first and _is_in_place(name)) for tensor in hosts):
        places = ", ".join(f"{tuple(t.shape)} on {CUDA if isinstance(t, CudaTensor) else 'the CPU'}" for t in tensors)
        raise DeviceError(f"{name} of tensors in two places ({places}), at {_find_caller().line}")
    if kwargs.get("generator") is not None:
        raise DeviceError(f"{name} on {CUDA} with a generator of the CPU, at {_find_caller().line}")


def _record_waits(name: str, first: Any, args: Any, kwargs: Any) -> None:
    """Record how often the host waits for a function."""
    if name in SYNCHRONIZING or (name == "where" and len(args) == 1):
        _record_wait(name)
    elif name in FROM_DATA:
        data = args[1] if name == "new_tensor" else first
        if not isinstance(data, CudaTensor):
            for reason in [*["a number of a tensor"] * len([*_find_tensors(data)]), "a copy to the device"]:
                _record_wait(f"{name}: {reason}")
    elif name == "copy_":
        from_cuda, to_cuda = isinstance(args[1], CudaTensor), isinstance(first, CudaTensor)
        _record_copy(args[1], from_cuda, first, to_cuda, kwargs.get("non_blocking", len(args) > 2 and args[2]))
    elif name == "repeat_interleave" and isinstance(kwargs.get("repeats", args[-1]), Tensor):
        if kwargs.get("output_size") is None:
            _record_wait("repeat_interleave by a tensor")
    elif name in INDEXING:
        _record_index_waits(name, args[1], args[2] if len(args) > 2 else None)


def _record_index_waits(name: str, index: Any, value: Any) -> None:
    """Record how often the host waits for an index."""
    parts = _split_index(index)
    if name != "__getitem__" and len(parts) == 1 and _is_mask(parts[0]) and not isinstance(value, Tensor):
        return
    for part in parts:
        if _is_mask(part):
            _record_wait("a mask as an index")
        elif isinstance(part, list) or (type(part) is Tensor and part.dim()):
            _record_wait("an index copied to the device")
        for number in (part.start, part.stop, part.step) if isinstance(part, slice) else (part,):
            if isinstance(number, CudaTensor) and not number.dim() and not _is_mask(number):
                _record_wait("a tensor as a number")
    if type(value) is Tensor and value.dim():
        _record_wait("a copy to the device")


def _record_gradient_waits(result: Tensor, index: Any, gradients: int) -> None:
    """Record a wait for each gradient of an indexing by masks, which searches the masks again."""
    card, sync = CudaDouble.current, _find_caller()._replace(operation="the gradient of a mask as an index")
    if card is not None and result.grad_fn is not None and (masks := sum(map(_is_mask, _split_index(index)))):
        result.grad_fn.register_prehook(lambda _: card.syncs.extend([sync] * masks * gradients))


def _cast(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments as CUDA's autocast casts them.

    Raises:
        NotImplementedError: a function written in Python whose treatment this file does not list.
    """
    dtype = None
    if name == "binary_cross_entropy":
        raise DeviceError(f"{name} under autocast, at {_find_caller().line}: take binary_cross_entropy_with_logits")
    if name in LOWER_PRECISION:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in FLOAT32 or (name in FLOAT32_UNLESS_TOLD and kwargs.get("dtype") is None):
        dtype = torch.float32
    elif name in WIDEST:
        dtype = (
            torch.float32 if any(tensor.dtype == torch.float32 for tensor in _find_tensors([args, kwargs])) else None
        )
    elif inspect.isfunction(func) and func.__module__ == "torch.nn.functional" and name not in KEEPS_TYPE:
        raise NotImplementedError(f"{name} under autocast: say in tests/cuda_double.py what CUDA makes of it")

    def cast(value: Any) -> Any:
        if isinstance(value, CudaTensor) and value.dtype.is_floating_point and value.dtype != torch.float64:
            return value.to(dtype)
        return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

    if dtype is None or kwargs.get("out") is not None:
        return args, kwargs
    return cast(args), {key: cast(value) for key, value in kwargs.items()}


def _find_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list | tuple | dict | slice):
            yield from _find_tensors(part)


def _split_index(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, tuple) else (index,)


def _is_mask(part: Any) -> bool:
    return isinstance(part, CudaTensor) and part.dtype in (torch.bool, torch.uint8)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and (not name.endswith("__") or name in AUGMENTED)


def _to_plain(tensor: Tensor) -> Tensor:
    """Return the values of a double as an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach().requires_grad_(tensor.requires_grad)
        return nn.Parameter(plain, plain.requires_grad) if isinstance(tensor, nn.Parameter) else plain


def _to_double(value: Any) -> Any:
    """Convert the tensors in a result to doubles in place."""
    for tensor in _find_tensors(value):
        if type(tensor) is Tensor:
            tensor.__class__ = CudaTensor
    return value


def _convert_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Convert a tensor in place to the device of another; parameters stay parameters."""
    tensor._is_param = isinstance(tensor, nn.Parameter) or isinstance(other, nn.Parameter)
    plain = nn.Parameter if tensor._is_param else Tensor
    tensor.__class__ = CudaTensor if isinstance(other, CudaTensor) else plain
    return tensor


def _record_wait(operation: str) -> None:
    if CudaDouble.current is not None:
        CudaDouble.current.syncs.append(_find_caller()._replace(operation=operation))
        _complete_copies(CudaDouble.current.arriving)


def _complete_copies(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.arriving = False  # type: ignore[attr-defined]
    tensors.clear()


def _find_caller() -> Sync:
    """Return the innermost line outside of torch and of this file."""
    frame = sys._getframe(1)
    while (package := frame.f_globals["__name__"].partition(".")[0]) in ("torch", __name__) and frame.f_back:
        frame = frame.f_back
    code, line_number = frame.f_code, frame.f_lineno
    where = code.co_qualname if package in ("cdc_mmpg", "data_modules") else f"{package}: {code.co_qualname}"
    file = "/".join(code.co_filename.rsplit("/", 2)[-2:])
    return Sync(where, f"{file}:{line_number}: {linecache.getline(code.co_filename, line_number).strip()}", "")
