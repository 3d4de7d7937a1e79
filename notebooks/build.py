"""Make the notebooks from their sources: each .py here with `# %%` cells becomes the .ipynb beside it.

The sources are what is reviewed and edited; a test checks that the notebooks are up to date.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def cells(source: str) -> list[dict]:
    """The cells of a source in percent format, in nbformat 4.5's terms."""
    found = []
    for number, block in enumerate(source.split("# %%")[1:]):
        head, _, body = block.partition("\n")
        lines = body.strip("\n").splitlines(keepends=True)
        cell: dict = {"id": f"cell-{number}", "metadata": {}}
        if head.strip() == "[markdown]":
            cell |= {"cell_type": "markdown", "source": [line.removeprefix("#").removeprefix(" ") for line in lines]}
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": [], "source": lines}
        found.append(cell)
    return found


def notebook(source: Path) -> str:
    """The text of the .ipynb of a source."""
    metadata = {
        "accelerator": "GPU",
        "colab": {"provenance": [], "gpuType": "T4"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": cells(source.read_text()), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def sources() -> list[Path]:
    return [file for file in sorted(FOLDER.glob("*.py")) if file != Path(__file__)]


if __name__ == "__main__":
    for file in sources():
        file.with_suffix(".ipynb").write_text(notebook(file))
        print(file.with_suffix(".ipynb"))
