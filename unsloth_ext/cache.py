"""Where downloads and built models live between runs: $UNSLOTH_EXT_CACHE, else $XDG_CACHE_HOME/unsloth_ext, else ~/.cache/unsloth_ext."""

import os
from pathlib import Path

from .errors import UsageError


def cache_dir(*parts: str) -> Path:
    """The folder `parts` inside the cache, created if it is missing. Raises UsageError where it cannot be."""
    root = os.environ.get("UNSLOTH_EXT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "unsloth_ext")
    folder = Path(root, *parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the cache folder {folder} cannot be made: {error.strerror}",
            "Set UNSLOTH_EXT_CACHE to a folder that you can write to.",
        ) from error
    return folder
