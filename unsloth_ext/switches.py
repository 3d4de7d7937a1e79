"""What a person said of a switch, an environment variable named UNSLOTH_EXT_...: one of the words for off, something else, or nothing."""

import os

OFF = ("0", "no", "off", "false")


def said(switch: str) -> str:
    """Lower case and without blanks around it; "" where nothing was said."""
    return os.environ.get(switch, "").strip().lower()
