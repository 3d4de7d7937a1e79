"""The machinery that puts patches into a running Unsloth and takes them out again. It knows no challenge."""

from .patch import ANY_SOURCE, NotHere, Patch, SetAttribute, SetItem, Target
from .registry import PatchError, PatchStatus, Registry, StatusTable

__all__ = [
    "ANY_SOURCE",
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
