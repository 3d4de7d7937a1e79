"""An image is bounded by its longer side.

`UnslothVisionDataCollator(resize="min")` shrinks images to the size that the model was made for, to save memory. Its default
`resize_dimension=0` looks at the width alone: 6000x400 becomes 512x34, but 400x6000 stays, with all of its patches. With "max", one
of its own choices, a picture and its transpose are treated alike.
"""

from __future__ import annotations

import functools
import inspect

LONGER_SIDE = "max"


def bound_by_longer_side(init):
    """The collator's `__init__` with "max" where the caller gives no `resize_dimension`; 0, 1 and "min" hold as before."""
    signature = inspect.signature(init)
    if "resize_dimension" not in signature.parameters:
        raise ValueError(f"{init.__qualname__} has no parameter resize_dimension")

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        if "resize_dimension" not in signature.bind(self, *args, **kwargs).arguments:
            kwargs["resize_dimension"] = LONGER_SIDE
        init(self, *args, **kwargs)

    return __init__
