"""Count where a step on a GPU would wait: its operators whose values or sizes the host reads, counted on a CPU."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ_ON_THE_HOST = {"nonzero", "nms", "_local_scalar_dense", "masked_select", "bincount", "_unique2", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """`with Waits() as waits: ...` counts in `waits.by_name`. What copies to the host does not show, but for `tolist`."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        is_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if name in READ_ON_THE_HOST or is_mask:
            self.by_name["boolean index" if is_mask else name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Waits":
        to_list = Tensor.tolist
        self.patch = patch.object(Tensor, "tolist", lambda x: self.by_name.update(["tolist"]) or to_list(x))
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.stop()
        super().__exit__(*error)
