"""Where downloads and built models live between runs: $UNSLOTH_EXT_CACHE, else $XDG_CACHE_HOME/unsloth_ext, else ~/.cache/unsloth_ext."""

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """The folder `parts` inside the cache, created if it is missing."""
    root = os.environ.get("UNSLOTH_EXT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "unsloth_ext")
    folder = Path(root, *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
