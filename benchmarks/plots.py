"""A figure as two SVGs, for a light and for a dark page: `name.light.svg` and `name.dark.svg`."""

from collections.abc import Callable
from pathlib import Path


def draw(folder: Path, name: str, paint: Callable, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> None:
    """paint: called with the figure's axes, as many as there are `columns`. Nothing is drawn, and that is said, without matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    plt.rcParams["svg.hashsalt"] = name  # the same figure is the same file
    for page, style, background in (("light", "default", "white"), ("dark", "dark_background", "#0d1117")):
        with plt.style.context(style):
            figure, axes = plt.subplots(1, columns, figsize=size, facecolor=background, squeeze=False)
            for one in axes[0]:
                one.set_facecolor(background)
            paint(*axes[0])
            figure.savefig(folder / f"{name}.{page}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
