"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU build of torch.

Python imports this file at its start if its folder is on ``PYTHONPATH``. torchvision registers
shapes for its compiled operators, which then do not exist: their names are declared first. Its
transforms in Python work, and image processors use no others.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = (
    *("_deform_conv2d_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward"),
    *("_roi_align_backward", "_roi_pool_backward", "deform_conv2d", "nms", "ps_roi_align"),
    *("ps_roi_pool", "qnms", "qroi_align", "roi_align", "roi_pool"),
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is not None:
            return  # the compiled operators fit it, without a GPU too
        type(self).library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            self.library.define(f"{operator}(Tensor x) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
