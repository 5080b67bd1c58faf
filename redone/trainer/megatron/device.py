"""Where Megatron-core runs: on CUDA as it is, or unmodified on CPU + gloo through a shim.

Megatron-core names torch.cuda in about 150 places. On a host without CUDA, `install()` (1) replaces the
torch.cuda functions that it calls and (2) defines a TorchFunctionMode that turns device="cuda" into "cpu" in
factory functions, makes Tensor.cuda() the identity and lets Tensor.type() answer 'torch.cuda.*'. The mode is
thread-local, so every public method of the trainer calls `ensure()` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")

# The last three: advice of 0.19 to callers of what 0.16 has no other way to do.
LOUD = (
    "tensor_parallel.random",
    "utils",
    "models.gpt.gpt_model",
    "distributed.distributed_data_parallel",
    "transformer.transformer_layer",
)
_thread = threading.local()
_installed = False


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class CudaOnCpu(TorchFunctionMode):
    """Answers for CUDA with CPU tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Event:
    """A CUDA event on a device that has no streams: everything has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def record(self, *args: object) -> None: ...
    def wait(self, *args: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


class _Stream:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


def on_cpu() -> bool:
    """Whether this process runs Megatron-core through the shim."""
    return _installed


def device() -> torch.device:
    """The device of parameters and inputs."""
    return torch.device("cpu") if _installed else torch.device("cuda", torch.cuda.current_device())


def ensure() -> None:
    """Enter the mode in this thread (idempotent; nothing on a CUDA host)."""
    if _installed and getattr(_thread, "mode", None) is None:
        _thread.mode = CudaOnCpu()
        _thread.mode.__enter__()


def on_device(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator of every public trainer method: `ensure()` first, whatever thread calls."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        ensure()
        return method(*args, **kwargs)

    return wrapped


def quiet() -> None:
    """Silence what Megatron-core says at import and build on any host."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\..*", category=FutureWarning)
    for name in LOUD:
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)


def prepare(kind: str) -> None:
    """Make this process ready for device "cpu" or "cuda". Idempotent."""
    quiet()
    if kind == "cpu":
        install()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    _mend_megatron()


def install() -> None:
    """Install the shim. Raises RuntimeError where CUDA is real."""
    global _installed
    if _installed:
        ensure()
        return
    if torch.cuda.is_available():
        raise RuntimeError("cluster.device=cpu on a host with CUDA: set CUDA_VISIBLE_DEVICES= (empty) for it")
    _replace_torch_cuda()
    _replace_megatron_rng_and_splits()
    _keep_mode_in_backward()
    _installed = True
    ensure()


def _trim_heap() -> None:
    """glibc keeps what activations of changing sizes leave behind; give it back to the system."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _replace_torch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = _trim_heap
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda *args, **kwargs: 0
    cuda.reset_peak_memory_stats = lambda *args, **kwargs: None
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


def _replace_megatron_rng_and_splits() -> None:
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # The CPU generator is the device generator here.
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    # Megatron turns split sizes into numpy only `if tensor.is_cuda`; gloo's all-to-all needs plain integers.
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move


def _keep_mode_in_backward() -> None:
    """Tensor.backward is itself dispatched through the mode, which is popped meanwhile: custom backward
    functions and activation recomputation would not see it. Re-enter it around the engine call."""
    original = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with CudaOnCpu():
            return original(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward


def _mend_megatron() -> None:
    """Two bugs of megatron-core that appear, on any device, without TransformerEngine and Apex. The first one
    is mended in 0.19.2."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.moe import moe_utils

    # router_gating_linear reads this name, which is only bound when TransformerEngine is importable.
    moe_utils.__dict__.setdefault("te_general_gemm", None)
    if not _torch_adam():
        return

    # Loading a fully_reshardable checkpoint copies every optimizer state key and fails with
    # KeyError('step'), which torch's AdamW keeps per parameter; the step is restored from the parameter
    # groups anyway.
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, value in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":
                value.copy_(tensors[key])

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _torch_adam() -> bool:
    """Whether Megatron-core uses torch's AdamW (neither TransformerEngine nor Apex is installed)."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    return bool(USING_PYTORCH_OPTIMIZER)
