import ast
import importlib
import sys

from upstream_on_disk import write_upstream

from unsloth_ext.patching import fingerprint


def _kernels(tmp_path, name, **changed):
    folder = write_upstream(tmp_path, name, **changed)
    return folder / "kernels.py"


def test_same_from_the_file_and_from_the_live_object(tmp_path, monkeypatch):
    file = _kernels(tmp_path, "upstream_live")
    monkeypatch.syspath_prepend(tmp_path)
    kernels = importlib.import_module("upstream_live.kernels")
    for name, value in {
        "scale": kernels.scale,
        "shift": kernels.shift,
        "Loader.load": vars(kernels.Loader)["load"],
        "TEMPLATE": kernels.TEMPLATE,
    }.items():
        assert fingerprint.of_object(value) == fingerprint.of_definition(file, name) is not None, name
    del sys.modules["upstream_live.kernels"]


def test_comments_and_layout_do_not_count_but_code_and_strings_do(tmp_path):
    def of(body, name):
        return fingerprint.of_definition(_kernels(tmp_path, name, **{"kernels.py": body}), "scale")

    plain = of("def scale(x):\n    return 2 * x\n", "a")
    assert of("def scale(x):\n    # twice\n\n    return 2 * x  # the factor\n", "b") == plain
    assert of("def scale(x):\n    return 3 * x\n", "c") != plain
    assert of("def scale(x):\n    return 2 * x + len('# a')\n", "d") != of(
        "def scale(x):\n    return 2 * x + len('# b')\n", "e"
    )


def test_indentation_and_the_inside_of_strings_count(tmp_path):
    def of(body, name):
        return fingerprint.of_definition(_kernels(tmp_path, name, **{"kernels.py": body}), "scale")

    inside = of("def scale(x):\n    if x:\n        y = 1\n        return y\n", "a")
    assert of("def scale(x):\n    if x:\n        y = 1\n    return y\n", "b") != inside
    for quotes, name in (('"""', "c"), ('f"""', "e")):
        plain = of(f'def scale(x):\n    return {quotes}a\n  b"""\n', name)
        for other, tag in (("a\n\n  b", "0"), ("a \n  b", "1"), ("a\n b", "2"), ("a\n  b\n", "3")):
            assert of(f'def scale(x):\n    return {quotes}{other}"""\n', name + tag) != plain
    assert of("def scale(x):\n\n    if x:   \n        y = 1  # one\n        return y\n", "d") == inside


def test_an_assignment_is_its_value(tmp_path):
    def of(body, name):
        return fingerprint.of_definition(_kernels(tmp_path, name, **{"kernels.py": body}), "NAMES")

    assert of("NAMES = frozenset(('a', 'b'))\n", "a") != of("NAMES = frozenset(('a', 'c'))\n", "b")


ODD = """\
# é and a line separator before it:\u2028\fstill this comment
A = B = dict(  # é
    a="ü",
)
class C:
    def f(self): return 1
    class D:
        def f(self): return 2
    Z = [
        1]
class C:
    def f(self): return 3
"""


def test_places_in_an_odd_text(tmp_path):
    file = _kernels(tmp_path, "odd", **{"kernels.py": ODD})
    tree = ast.parse(ODD)
    value = fingerprint.of_object(ast.get_source_segment(ODD, tree.body[0].value))
    assert fingerprint.of_definition(file, "A") == fingerprint.of_definition(file, "B") == value
    inner = tree.body[1].body[2].value
    assert fingerprint.of_definition(file, "C.Z") == fingerprint.of_object(ast.get_source_segment(ODD, inner))
    assert fingerprint.of_definition(file, "C.f") == fingerprint.of_object("    def f(self): return 1")
    assert fingerprint.of_definition(file, "C.D.f") == fingerprint.of_object("        def f(self): return 2")


def test_a_replaced_function_has_another_fingerprint(tmp_path, monkeypatch):
    _kernels(tmp_path, "upstream_replaced")
    monkeypatch.syspath_prepend(tmp_path)
    kernels = importlib.import_module("upstream_replaced.kernels")
    before = fingerprint.of_object(kernels.scale)
    kernels.scale = lambda x: 5 * x
    assert fingerprint.of_object(kernels.scale) != before


def test_what_has_no_source_has_none():
    assert fingerprint.of_object(len) is None
    assert fingerprint.of_object(eval("lambda: 0")) is None


def test_the_last_definition_counts_and_a_missing_one_is_none(tmp_path):
    file = _kernels(tmp_path, "twice", **{"kernels.py": "def f():\n    return 1\n\ndef f():\n    return 2\n"})
    single = _kernels(tmp_path, "once", **{"kernels.py": "def f():\n    return 2\n"})
    assert fingerprint.of_definition(file, "f") == fingerprint.of_definition(single, "f")
    assert fingerprint.of_definition(file, "g") is None
    assert fingerprint.of_definition(file, "Loader.load") is None
