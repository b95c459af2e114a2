"""A double for CUDA: tensors that say that they are on a GPU, and the device mistakes that only a GPU would show.

A `CudaTensor` has its values on the CPU, which does its arithmetic; above autograd (`__torch_function__`) it says
`cuda:0`. Within `with CudaDouble() as card:` whatever asks for a CUDA device gets one (`.to("cuda")`, `.cuda()`,
`torch.zeros(..., device="cuda")`, `Trainer(**card.trainer())`), and

- what CUDA refuses raises `DeviceError`, with operation and line: tensors of both places in one operation (a CPU tensor
  without dimensions may take part; indices and `copy_` are copied), `.numpy()`, a generator of the CPU. So does what is
  on its way to the host and read before anybody has waited for it, which CUDA would answer with any values;
- `torch.autocast("cuda")` casts as CUDA does, by the lists in PyTorch's own header;
- `card.syncs` holds every time that the host waited for the device, with the line that made it wait.

What waits is what `torch.cuda.set_sync_debug_mode` reports (tests/test_cuda_double.py compares, where there is a GPU):

- a value becomes Python's: `item`, `tolist`, `bool`, `int`, `float`, an index, a slice's end, `in`, `equal`, printing;
- a size depends on values: `nonzero`, `unique`, `masked_select`, `bincount`, `repeat_interleave` by a tensor, an index
  that is a mask, and its gradient once more. Filling by a mask with a number does not wait (`masked_fill`);
- `multinomial`, and of `torch.linalg` what looks whether it failed;
- a copy between host and device, those of `copy_`, `tensor` and indices on the host too, unless it is `non_blocking`.
  One to the device from memory that is not pinned waits all the same, which PyTorch does not report. Waiting for an
  event (`torch.cuda.Event`) is none of these: what it waits for may be long done.
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

# By the names of functions, methods and operators.
ELSEWHERE = {"device", "_parse_to", "_set_grad_enabled"}  # of no tensor
SIZES = {"dim", "size", "numel", "__len__", "stride", "is_contiguous"}
SAYS = {"device": CUDA, "is_cuda": True, "is_cpu": False}
MOVING = {"to", "cuda", "cpu", "type_as"}
FROM_DATA = {"tensor", "as_tensor", "asarray", "new_tensor"}
EITHER = FROM_DATA | {
    "copy_", "data.__set__", "view_as", "expand_as", "reshape_as", "_has_compatible_shallow_copy_type",
}  # fmt: skip
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
AUGMENTED = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
NO_SCALAR = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "index_select", "gather", "embedding"}
WAITING = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "__contains__", "__repr__",
    "__format__", "__reduce_ex__", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
    "equal", "allclose", "multinomial", "linalg_cholesky", "linalg_inv", "linalg_eigh", "linalg_solve", "linalg_svd",
}  # fmt: skip

# The operators that CUDA's autocast treats in one way; beside them what is made of these, in Python or not.
POLICIES = {
    name: set(re.findall(r"_\((?:ADD_NS\()?(\w+)", text.partition("\n\n")[0]))
    for name, text in re.findall(
        r"define AT_FORALL_(\w+)\(_\)(.+?\n\n)",
        (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text(),
        re.DOTALL,
    )
}
LOWER = POLICIES["LOWER_PRECISION_FP"] | {"__matmul__", "__rmatmul__", "multi_dot"}
FLOAT32 = POLICIES["FP32"] | {
    "__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "square", "cross_entropy", "normalize", "interpolate", "norm",
    "linalg_norm",
}  # fmt: skip
FLOAT32_UNLESS_TOLD = POLICIES["FP32_SET_OPT_DTYPE"]
WIDEST = POLICIES["PROMOTE"]
AS_IT_IS = {"dropout", "embedding", "pad"}


class DeviceError(RuntimeError):
    """What CUDA refuses."""


class Sync(NamedTuple):
    """That the host waited for the device."""

    where: str  # the function: its name if it is ours, else "package: name"
    line: str  # "file:number: text"
    operation: str


class CudaTensor(Tensor):
    """A tensor of the CPU that says it is on `cuda:0`."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class CudaDouble(TorchFunctionMode):
    """A computer with one GPU, as a context.

    Attributes:
        syncs: that the host waited for the device, in order.
        arriving: tensors on their way to the host.
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
            ("cuda.get_rng_state_all", list), ("cuda.synchronize", lambda device=None: _wait("synchronize")),
            ("accelerator.is_available", lambda: True), ("accelerator.current_stream", lambda device=None: stream),
        ):  # fmt: skip
            self._patches.enter_context(mock.patch(f"torch.{name}", value))
        self._patches.enter_context(mock.patch.object(CudaDouble, "current", self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def trainer(self) -> dict[str, Any]:
        """The arguments of a Trainer on this GPU."""
        return {"accelerator": "auto", "devices": 1, "strategy": SingleDeviceStrategy(CUDA, CudaAccelerator())}


class CudaAccelerator(CPUAccelerator):
    """Lightning's view of the GPU."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing: there is no driver."""


class Event:
    """`torch.cuda.Event`, of the one stream that there is."""

    def __init__(self, **_: bool) -> None:
        self._arriving: list[Tensor] = []

    def record(self, stream: Any = None) -> None:
        if CudaDouble.current is not None:
            self._arriving = [*CudaDouble.current.arriving]

    def synchronize(self) -> None:
        _arrive(self._arriving)

    def query(self) -> bool:
        self.synchronize()
        return True


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Do what a function of torch does, on the CPU, as CUDA would."""
    name, own = func.__name__, args[0] if args else None
    if name in ELSEWHERE:
        return func(*args, **kwargs)
    if name == "__get__":
        return _look_up(func, own)
    if name == "__set__":
        name = f"{func.__self__.__name__}.__set__"  # type: ignore[attr-defined]
    tensors = [*_tensors(args), *_tensors(kwargs)]
    doubles = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    if (early := [tensor for tensor in tensors if getattr(tensor, "arriving", False)]) and name not in SIZES:
        raise DeviceError(f"{name} of {tuple(early[0].shape)}, still on its way to the host, at {_place().line}")
    device = next((value for value in args if isinstance(value, torch.device)), kwargs.get("device"))
    if name in MOVING or (name in ("as_tensor", "asarray") and isinstance(own, Tensor) and device is not None):
        return _move(name, *args, **kwargs)
    wanted = device is not None and torch.device(device).type == "cuda"
    if not (doubles or wanted):
        return _pin(name, own) if name in ("pin_memory", "is_pinned") else func(*args, **kwargs)
    if isinstance(own, CudaTensor) and (answer := _say(name, own, args)) is not None:
        return answer
    _refuse(name, own, args, kwargs, tensors)
    _count(name, own, args, kwargs)
    indexed = [own, *args[2:3]] if name in INDEXING else []
    wanting = sum(isinstance(part, Tensor) and part.requires_grad for part in indexed)
    args = tuple(CPU if isinstance(value, torch.device) else value for value in args)
    kwargs = kwargs if device is None else {**kwargs, "device": CPU}
    untouched = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with torch._C.DisableTorchFunctionSubclass(), untouched:
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _cast(func, name, args, kwargs)
        result = func(*args, **kwargs)
    if name == "data.__set__":
        _place_as(own, args[1])
    if wanting:
        _count_gradients(own if result is None else result, args[1], wanting)
    stays = name in FROM_DATA and not isinstance(own, CudaTensor) if device is None else not wanted
    return result if stays or _is_in_place(name) else _on_cuda(result)


def _look_up(func: Callable[..., Any], own: Any) -> Any:
    """An attribute of a tensor."""
    if not isinstance(own, CudaTensor):
        return func(own)
    name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass():
        return SAYS[name] if name in SAYS else _on_cuda(func(own))


def _say(name: str, own: Tensor, args: Any) -> Any:
    """What a double says of itself, as Python objects; None where it has to be computed."""
    if name in ("numpy", "__array__"):
        raise DeviceError(f"{name} of a tensor on {CUDA}, at {_place().line}: take .cpu() of it before")
    if name == "type" and len(args) == 1:
        return _plain(own).type().replace("torch.", "torch.cuda.")
    if name == "__deepcopy__":
        return _place_as(_plain(own).clone().detach().requires_grad_(own.requires_grad), own)
    if name in ("__reduce_ex__", "__repr__", "__format__"):
        _wait(name)
        return getattr(_plain(own), name)(*args[1:])
    return 0 if name == "get_device" else None


def _pin(name: str, own: Tensor) -> Any:
    """Pin a tensor of the host, or say whether it is."""
    if name == "is_pinned":
        return hasattr(own, "pinned")
    pinned = own.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _move(name: str, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do what a function does that may take a tensor elsewhere."""
    other = kwargs.pop("other", args[0] if args else None)
    if isinstance(other, Tensor):
        args = (other.device, other.dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    if name in ("cuda", "cpu"):
        kwargs.pop("device", None)
        args = (CUDA if name == "cuda" else CPU, None, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    here = isinstance(own, CudaTensor)
    there = here if device is None else device.type == "cuda"
    with torch._C.DisableTorchFunctionSubclass():
        place = CPU if here or there else device or own.device
        layout = layout or torch.preserve_format
        moved = own.to(place, dtype or own.dtype, copy=copy or here != there, memory_format=layout)
    _carry(own, here, moved, there, non_blocking)
    return _on_cuda(moved) if there else moved


def _carry(source: Tensor, here: bool, target: Tensor, there: bool, non_blocking: bool) -> None:
    """Note whether the host waits for a copy, or what arrives there later."""
    if here == there:
        return
    if not non_blocking:
        _wait(f"a copy to the {'device' if there else 'host'}")
    elif there and not hasattr(source, "pinned"):
        _wait("a copy to the device from memory that is not pinned")
    elif here and CudaDouble.current is not None:
        target.arriving = True  # type: ignore[attr-defined]
        CudaDouble.current.arriving.append(target)


def _refuse(name: str, own: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses."""
    hosts = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if name in INDEXING and isinstance(own, CudaTensor):
        by_tensor = isinstance(args[1], list) or any(True for _ in _tensors(args[1]))
        hosts = [value for value in args[2:] if by_tensor and type(value) is Tensor]
    elif name in EITHER:
        hosts = []
    if any(tensor.dim() or name in NO_SCALAR or (tensor is own and _is_in_place(name)) for tensor in hosts):
        found = ", ".join(f"{tuple(t.shape)} on {CUDA if isinstance(t, CudaTensor) else 'the CPU'}" for t in tensors)
        raise DeviceError(f"{name} of tensors in two places ({found}), at {_place().line}")
    if kwargs.get("generator") is not None:
        raise DeviceError(f"{name} on {CUDA} with a generator of the CPU, at {_place().line}")


def _count(name: str, own: Any, args: Any, kwargs: Any) -> None:
    """Note how often the host waits for a function."""
    if name in WAITING or (name == "where" and len(args) == 1):
        _wait(name)
    elif name in FROM_DATA:
        data = args[1] if name == "new_tensor" else own
        if not isinstance(data, CudaTensor):
            for reason in [*["a number of a tensor"] * len([*_tensors(data)]), "a copy to the device"]:
                _wait(f"{name}: {reason}")
    elif name == "copy_":
        here, there = isinstance(args[1], CudaTensor), isinstance(own, CudaTensor)
        _carry(args[1], here, own, there, kwargs.get("non_blocking", len(args) > 2 and args[2]))
    elif name == "repeat_interleave" and isinstance(kwargs.get("repeats", args[-1]), Tensor):
        if kwargs.get("output_size") is None:
            _wait("repeat_interleave by a tensor")
    elif name in INDEXING:
        _count_index(name, args[1], args[2] if len(args) > 2 else None)


def _count_index(name: str, index: Any, value: Any) -> None:
    """Note how often the host waits for an index."""
    parts = _parts(index)
    if name != "__getitem__" and len(parts) == 1 and _is_mask(parts[0]) and not isinstance(value, Tensor):
        return
    for part in parts:
        if _is_mask(part):
            _wait("a mask as an index")
        elif isinstance(part, list) or (type(part) is Tensor and part.dim()):
            _wait("an index copied to the device")
        for number in (part.start, part.stop, part.step) if isinstance(part, slice) else (part,):
            if isinstance(number, CudaTensor) and not number.dim() and not _is_mask(number):
                _wait("a tensor as a number")
    if type(value) is Tensor and value.dim():
        _wait("a copy to the device")


def _count_gradients(result: Tensor, index: Any, wanting: int) -> None:
    """Have it noted that each gradient of an indexing by masks looks once more for what is not zero."""
    card, sync = CudaDouble.current, _place()._replace(operation="the gradient of a mask as an index")
    if card is not None and result.grad_fn is not None and (masks := sum(map(_is_mask, _parts(index)))):
        result.grad_fn.register_prehook(lambda _: card.syncs.extend([sync] * masks * wanting))


def _cast(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments as CUDA's autocast hands them on.

    Raises:
        NotImplementedError: a function written in Python, of which nobody has said here what it is made of.
    """
    dtype = None
    if name == "binary_cross_entropy":
        raise DeviceError(f"{name} under autocast, at {_place().line}: take binary_cross_entropy_with_logits")
    if name in LOWER:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in FLOAT32 or (name in FLOAT32_UNLESS_TOLD and kwargs.get("dtype") is None):
        dtype = torch.float32
    elif name in WIDEST:
        dtype = torch.float32 if any(tensor.dtype == torch.float32 for tensor in _tensors([args, kwargs])) else None
    elif inspect.isfunction(func) and func.__module__ == "torch.nn.functional" and name not in AS_IT_IS:
        raise NotImplementedError(f"{name} under autocast: say in tests/cuda_double.py what CUDA makes of it")

    def cast(value: Any) -> Any:
        if isinstance(value, CudaTensor) and value.dtype.is_floating_point and value.dtype != torch.float64:
            return value.to(dtype)
        return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

    if dtype is None or kwargs.get("out") is not None:
        return args, kwargs
    return cast(args), {key: cast(value) for key, value in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list | tuple | dict | slice):
            yield from _tensors(part)


def _parts(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, tuple) else (index,)


def _is_mask(part: Any) -> bool:
    return isinstance(part, CudaTensor) and part.dtype in (torch.bool, torch.uint8)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and (not name.endswith("__") or name in AUGMENTED)


def _plain(tensor: Tensor) -> Tensor:
    """The values of a double, for themselves."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.detach().requires_grad_(tensor.requires_grad)
        return nn.Parameter(plain, plain.requires_grad) if isinstance(tensor, nn.Parameter) else plain


def _on_cuda(value: Any) -> Any:
    """Results, from now on doubles."""
    for tensor in _tensors(value):
        if type(tensor) is Tensor:
            tensor.__class__ = CudaTensor
    return value


def _place_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor, from now on where the other is; parameters stay parameters."""
    tensor._is_param = isinstance(tensor, nn.Parameter) or isinstance(other, nn.Parameter)
    plain = nn.Parameter if tensor._is_param else Tensor
    tensor.__class__ = CudaTensor if isinstance(other, CudaTensor) else plain
    return tensor


def _wait(operation: str) -> None:
    if CudaDouble.current is not None:
        CudaDouble.current.syncs.append(_place()._replace(operation=operation))
        _arrive(CudaDouble.current.arriving)


def _arrive(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.arriving = False  # type: ignore[attr-defined]
    tensors.clear()


def _place() -> Sync:
    """The innermost line that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while (package := frame.f_globals["__name__"].partition(".")[0]) in ("torch", __name__) and frame.f_back:
        frame = frame.f_back
    code, number = frame.f_code, frame.f_lineno
    where = code.co_qualname if package in ("cdc_mmpg", "data_modules") else f"{package}: {code.co_qualname}"
    file = "/".join(code.co_filename.rsplit("/", 2)[-2:])
    return Sync(where, f"{file}:{number}: {linecache.getline(code.co_filename, number).strip()}", "")
