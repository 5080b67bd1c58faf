"""TEST STUB, not SGLang's kernel package: every function can be imported and raises when it is called.

SGLang imports `sgl_kernel` everywhere, and its wheels are built for CUDA. On a CPU without AMX the dense and
mixture-of-experts models run SGLang's own torch code and call none of these functions. What runs with it
shows SGLang's engine, scheduler, cache and weight loading with our adapter; it shows nothing of the kernels.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

__version__ = "0+stub"
__path__: list[str] = []
# SGLang has a replacement of its own for these where their import fails.
ABSENT = {"sgl_kernel.scalar_type"}


def _refusal(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"test stub of sgl_kernel: {name} is a CUDA kernel")

    return refuse


def __getattr__(name: str) -> Callable[..., Any]:
    return _refusal(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Submodules of the stub: empty, with the same refusals."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("sgl_kernel.") or fullname in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = _refusal
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Finder())
