"""A small upstream on disk, laid out like Unsloth: a package with a version file, kernels, and a module that imports by name."""

import textwrap

FILES = {
    "__init__.py": "",
    "_version.py": '__version__ = "2026.10.9"\n',
    "kernels.py": '''
        def scale(x):
            """Twice."""
            return 2 * x  # the factor

        def shift(x):
            return x + 1

        class Loader:
            @staticmethod
            def load(name):
                return f"loaded {name}"

        TEMPLATE = "{{ message }}"
        TABLE = {"a": (TEMPLATE, 1), "b": (TEMPLATE, 2)}
    ''',
    "model.py": """
        from .kernels import scale
        from . import kernels

        def forward(x):
            return scale(x)
    """,
}


def write_upstream(folder, name="upstream", **changed):
    package = folder / name
    package.mkdir(parents=True)
    for file, text in (FILES | changed).items():
        (package / file).write_text(textwrap.dedent(text))
    return package
