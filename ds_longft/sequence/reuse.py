"""Whether a backward pass may write a gradient over what was saved for it.

That spares as much memory as the tensor takes, where memory is shortest. It is right only if nobody else will read the
tensor: another attention of the layer, a later layer, a router beside the MLP. Autograd's own guard, the version of a
tensor, does not help: inside a checkpoint it is not looked at, and the other reader gets gradients for its values.
So the references to the memory are counted. All that can still read it holds one: a saved tensor, a checkpoint's copy
of its handle, a cache of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ours_alone(saved: Tensor) -> bool:
    """Whether `saved` is the only tensor left that refers to its memory, and no two of its elements share a place.

    Save `x.detach()` to ask this of: saving x itself would keep, outside of a checkpoint, what x is a view of.
    """
    storage = saved.untyped_storage()
    references = torch._C._storage_Use_Count(storage._cdata)  # one is `saved`, one is `storage`
    return references <= 2 and 0 not in saved.stride()
