"""TEST STUB: lets torchvision's wheel, which is built for CUDA, be imported beside torch's CPU build.

Its compiled operators do not load there, and its import ends because two of them are unknown. SGLang and
transformers import torchvision for image models, which no test runs. They are declared without code.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds nothing; acts when torchvision is looked for while torch is there."""
        torch = sys.modules.get("torch")
        if fullname == "torchvision" and torch is not None and not hasattr(self, "library"):
            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DeclareOperators())
