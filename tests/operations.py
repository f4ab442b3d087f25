"""What torch does in a block of code: the memory of its results, and where the host waits."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from goldfish import linear

# Each of these gives the host a number or a shape that depends on data: on a GPU it waits for it.
WAITS = {
    "aten::_local_scalar_dense",  # .item(), .tolist() of one number, bool(tensor), int(tensor)
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::repeat_interleave",
}
INDEXES = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}


class Operations(TorchDispatchMode):
    """Records operations, also those inside goldfish's own operator, which torch hides.

    Attributes: `waits`, the names of operations that make the host wait, in order; `largest`, the
    bytes of the largest storage that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "goldfish::linear_cross_entropy":
            with self:
                result = linear._forward._init_fn(*args, **(kwargs or {}))
        else:
            if name in WAITS or (name in INDEXES and has_boolean_index(args[1])):
                self.waits.append(name)
            before = devices(args)
            result = func(*args, **(kwargs or {}))
            crossed = devices((result,)) | before
            if len(crossed) > 1 and name in ("aten::_to_copy", "aten::copy_"):
                self.waits.append(f"{name} {' and '.join(sorted(crossed))}")
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def has_boolean_index(indices) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(index is not None and index.dtype in masks for index in indices)


def devices(values) -> set[str]:
    leaves = tree_leaves(values)
    return {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
