"""The machinery that puts patches into a running Unsloth and takes them out again. It knows no challenge."""

from .patch import NotHere, Patch, SetAttribute, SetItem, Target
from .registry import PatchError, PatchStatus, Registry, StatusTable

__all__ = [
    "NotHere",
    "Patch",
    "PatchError",
    "PatchStatus",
    "Registry",
    "SetAttribute",
    "SetItem",
    "StatusTable",
    "Target",
]
