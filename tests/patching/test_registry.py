"""The registry against a small real package on disk."""

import functools
import importlib
import re
import sys
import threading
from dataclasses import replace

import pytest
from upstream_on_disk import write_upstream

from unsloth_ext.errors import UsageError
from unsloth_ext.patching import NotHere, Patch, PatchError, Registry, SetAttribute, SetItem, Target
from unsloth_ext.patching.fingerprint import of_definition
from unsloth_ext.patching.survey import survey


class World:
    """One upstream package under its own name, the patches for it, and a registry."""

    def __init__(self, folder, name, monkeypatch, **changed):
        self.pristine = write_upstream(folder / "pristine", name)
        self.package = write_upstream(folder / "installed", name, **changed)
        self.name = name
        self.calls = 0
        monkeypatch.syspath_prepend(self.package.parent)

    def target(self, attribute, versions=">=2026.10.1"):
        known = of_definition(self.pristine / "kernels.py", attribute)
        return Target(f"{self.name}.kernels", attribute, versions, (known,))

    def patch(self, attribute="scale", **given):
        def replace(original):
            self.calls += 1

            @functools.wraps(original)
            def tenfold(x):
                return 10 * original(x)

            return tenfold

        if "changes" not in given:
            given.setdefault("replace", replace)
        versions = given.pop("versions", ">=2026.10.1")
        return Patch(
            **{"id": "room.scale", "challenge": "A", "summary": "ten times better"} | given,
            targets=(self.target(attribute, versions),),
        )

    def registry(self, *patches, **options):
        registry = Registry(**options)
        registry.register(patches)
        return registry

    def load(self, module):
        return importlib.import_module(f"{self.name}.{module}")


@pytest.fixture
def world(tmp_path, monkeypatch, request):
    finders = list(sys.meta_path)
    name = "upstream_" + re.sub(r"\W", "_", request.node.name)
    yield functools.partial(World, tmp_path, name, monkeypatch)
    sys.meta_path[:] = finders
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def state(registry):
    (row,) = registry.status()
    return row.state, row.reason


def test_patched_before_anyone_imports_from_it(world):
    w = world()
    registry = w.registry(w.patch())
    registry.enable()
    assert state(registry) == ("pending", "")
    assert w.load("model").forward(1) == 20
    assert state(registry) == ("applied", "")


def test_a_patch_with_a_switch_waits_for_it(world, monkeypatch):
    w = world()
    until = "until ROOM_SCALE=1 or unsloth_ext.enable('room.scale') switches it on"
    for value in (None, "", "0", "off"):
        monkeypatch.delenv("ROOM_SCALE", raising=False) if value is None else monkeypatch.setenv("ROOM_SCALE", value)
        registry = w.registry(w.patch(switch="ROOM_SCALE"))
        assert state(registry) == ("disabled", until)
        for names in ((), ("all",), ("room",)):
            registry.enable(*names)
            assert state(registry) == ("disabled", until)
    assert w.load("model").forward(1) == 2
    registry.enable("room.scale")
    assert state(registry) == ("applied", "") and w.load("model").forward(1) == 20
    registry.disable()
    monkeypatch.setenv("ROOM_SCALE", "1")
    registry.enable()
    assert state(registry) == ("applied", "") and w.load("model").forward(1) == 20


def test_a_patch_that_is_on_unless_switched_off(world, monkeypatch):
    w = world()
    for value, expected in (
        (None, "pending"),
        ("", "pending"),
        ("all", "pending"),
        ("0", "disabled"),
        ("off", "disabled"),
    ):
        monkeypatch.delenv("ROOM_SCALE", raising=False) if value is None else monkeypatch.setenv("ROOM_SCALE", value)
        registry = w.registry(w.patch(switch="ROOM_SCALE", on_unless_switched_off=True))
        registry.enable()
        assert state(registry)[0] == expected


def test_enabling_the_rest_keeps_why_a_patch_with_a_switch_failed(world, monkeypatch):
    w = world()
    monkeypatch.delenv("ROOM_SCALE", raising=False)

    def changes(module, target):
        raise RuntimeError("there is no such card")

    registry = w.registry(w.patch(switch="ROOM_SCALE", changes=changes))
    registry.enable("room.scale")
    w.load("model")
    assert state(registry) == ("failed", "RuntimeError: there is no such card")
    registry.enable()
    assert state(registry) == ("failed", "RuntimeError: there is no such card")


def test_the_loader_is_gone_from_the_module(world):
    w = world()
    w.registry(w.patch()).enable()
    kernels = w.load("kernels")
    assert type(kernels.__loader__).__name__ == type(kernels.__spec__.loader).__name__ == "SourceFileLoader"


def test_late_import_reaches_every_module_that_has_it_and_is_undone(world):
    w = world()
    model = w.load("model")
    original = model.scale
    registry = w.registry(w.patch())
    registry.enable()
    assert model.forward(1) == 20 and model.scale is model.kernels.scale is not original
    registry.disable()
    assert model.scale is model.kernels.scale is original
    assert registry._finder not in sys.meta_path


def test_a_module_imported_while_patched_gets_the_original_back(world):
    w = world()
    registry = w.registry(w.patch())
    registry.enable()
    model = w.load("model")
    registry.disable()
    assert model.forward(1) == 2 and not hasattr(model.scale, "__wrapped__")


def test_ten_times_off_and_on(world):
    w = world()
    model = w.load("model")
    registry = w.registry(w.patch())
    before = dict(vars(model.kernels)), dict(vars(model))
    for _ in range(10):
        registry.enable()
        assert model.forward(1) == 20
        registry.disable()
        assert (dict(vars(model.kernels)), dict(vars(model))) == before


def test_enabled_twice_applies_once(world):
    w = world()
    w.load("model")
    registry = w.registry(w.patch())
    registry.enable()
    registry.enable()
    assert w.load("model").forward(1) == 20 and w.calls == 1


def test_threads_apply_once(world):
    w = world()
    model = w.load("model")
    together = threading.Barrier(8)

    def slow(original):
        together.wait(timeout=120)  # every thread is in here before any of them may go on
        return lambda x: 10 * original(x)

    registry = w.registry(w.patch(replace=slow))
    threads = [threading.Thread(target=registry.enable) for _ in range(8)]
    # The first enable() makes it pending for all; each thread then computes a replacement and one of them makes it.
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert model.forward(1) == 20
    registry.disable()
    assert model.forward(1) == 2


def test_imported_by_another_thread_right_now(world):
    w = world(**{"kernels.py": "import time\ntime.sleep(0.5)\ndef scale(x):\n    return 2 * x\n"})
    known = of_definition(w.package / "kernels.py", "scale")
    patch = Patch(
        "room.scale", "A", "s", (Target(f"{w.name}.kernels", "scale", ">=1", (known,)),), lambda f: lambda x: 20
    )
    importing = threading.Thread(target=w.load, args=("kernels",))
    importing.start()
    while f"{w.name}.kernels" not in sys.modules:
        pass
    registry = w.registry(patch)
    registry.enable()
    importing.join()
    assert state(registry) == ("applied", "") and w.load("kernels").scale(1) == 20


def test_changed_upstream_is_left_alone(world):
    w = world(**{"kernels.py": "def scale(x):\n    return 3 * x\n"})
    registry = w.registry(w.patch())
    registry.enable()
    assert w.load("kernels").scale(1) == 3
    what, why = state(registry)
    assert what == "skipped" and "upstream changed" in why and f"{w.name}.kernels.scale" in why
    assert w.calls == 0


def test_definition_that_is_gone(world):
    w = world(**{"kernels.py": "x = 1\n"})
    registry = w.registry(w.patch())
    registry.enable()
    w.load("kernels")
    assert state(registry)[0] == "skipped" and "gone or not readable" in state(registry)[1]


def test_strict_names_the_patch(world):
    w = world(**{"kernels.py": "def scale(x):\n    return 3 * x\n"})
    registry = w.registry(w.patch(), strict=True)
    registry.enable()
    with pytest.raises(PatchError, match=r"room\.scale skipped: upstream changed"):
        w.load("kernels")


@pytest.mark.parametrize("versions, superseded, expected", [
    (">=2027.1", (), ("skipped", "for {} >=2027.1, this is 2026.10.9")),
    (">=2026.10.1", ((">=2026.10.9", "as fast since (1.00x)"),), ("superseded", "{} 2026.10.9: as fast since (1.00x)")),
])  # fmt: skip
def test_release_decides_as_soon_as_the_package_is_there(world, versions, superseded, expected):
    w = world()
    registry = w.registry(w.patch(versions=versions, superseded=superseded))
    registry.enable()
    importlib.import_module(w.name)
    assert state(registry) == (expected[0], expected[1].format(w.name))


def test_a_patch_that_is_not_for_this_machine(world):
    w = world()
    model, here = w.load("model"), False

    def changes(module, target):
        if not here:
            raise NotHere("for another card")
        return [SetAttribute(module, "scale", lambda x: -x)]

    registry = w.registry(w.patch(changes=changes), strict=True)
    registry.enable()  # no error under strict: nothing is wrong
    assert state(registry) == ("disabled", "for another card") and model.forward(1) == 2
    here = True
    registry.enable()
    assert state(registry)[0] == "applied" and model.forward(1) == -1


def test_failing_replacement_leaves_upstream_as_it_was(world):
    w = world()
    model = w.load("model")

    def broken(original):
        raise RuntimeError("no such card")

    registry = w.registry(w.patch(replace=broken))
    registry.enable()
    assert state(registry) == ("failed", "RuntimeError: no such card") and model.forward(1) == 2


def test_half_made_changes_are_taken_back(world):
    w = world()
    kernels = w.load("kernels")
    before = dict(vars(kernels)), dict(kernels.TABLE)

    class Sealed:
        __slots__ = ()

    def changes(module, target):
        yield SetAttribute(module, "TEMPLATE", "new")
        yield SetItem(module.TABLE, "a", "new")
        yield SetItem(module.TABLE, "c", "new")
        yield SetAttribute(Sealed, "__slots__", property())
        yield SetItem((), 0, "cannot")

    registry = w.registry(w.patch("TEMPLATE", changes=changes))
    registry.enable()
    assert state(registry)[0] == "failed"
    assert (dict(vars(kernels)), dict(kernels.TABLE)) == before and Sealed.__slots__ == ()


def test_staticmethods_and_tables_come_back_as_the_same_objects(world):
    w = world()
    kernels = w.load("kernels")
    raw, table = vars(kernels.Loader)["load"], dict(kernels.TABLE)

    def loud(original):
        return staticmethod(lambda name: original.__func__(name).upper())

    def edit(module, target):
        return [SetItem(module.TABLE, key, ("new", entry[1])) for key, entry in module.TABLE.items()]

    registry = w.registry(
        w.patch("Loader.load", id="room.load", replace=loud), w.patch("TEMPLATE", id="room.table", changes=edit)
    )
    registry.enable()
    assert kernels.Loader.load("a") == "LOADED A" and kernels.TABLE["b"] == ("new", 2)
    registry.disable()
    assert vars(kernels.Loader)["load"] is raw and all(kernels.TABLE[k] is v for k, v in table.items())


def test_what_somebody_put_over_ours_stays(world):
    w = world()
    kernels = w.load("kernels")
    registry = w.registry(w.patch())
    registry.enable()

    def theirs(x):
        return 0

    kernels.scale = theirs
    registry.disable()
    assert kernels.scale is theirs
    what, why = state(registry)
    assert what == "applied" and "cannot be taken out" in why and "test_registry" in why


def test_wrapped_by_somebody_it_stays_in_once(world):
    w = world()
    kernels = w.load("kernels")
    registry = w.registry(w.patch())
    registry.enable()
    ours = kernels.scale
    kernels.scale = functools.wraps(ours)(lambda x: ours(x) + 1)
    for _ in range(2):
        registry.disable()
        registry.enable()
        assert kernels.scale(1) == 21 and state(registry)[0] == "applied"


def test_two_patches_on_one_function(world):
    w = world()
    kernels = w.load("kernels")
    pristine = dict(vars(kernels))

    def times(factor):
        return lambda original: functools.wraps(original)(lambda x: factor * original(x))

    registry = w.registry(w.patch(id="a.scale", replace=times(10)), w.patch(id="b.scale", replace=times(7)))
    registry.enable()
    assert kernels.scale(1) == 140
    registry.disable("a")
    assert kernels.scale(1) == 14 and [row.state for row in registry.status()] == ["disabled", "applied"]
    registry.enable("a")
    assert kernels.scale(1) == 140
    registry.disable("b")
    assert kernels.scale(1) == 20
    registry.disable()
    assert dict(vars(kernels)) == pristine


@pytest.mark.parametrize("how", ["reload", "import again"])
def test_a_module_executed_again_is_patched_again(world, how):
    w = world()
    registry = w.registry(w.patch())
    registry.enable()
    kernels = w.load("kernels")
    if how == "reload":
        importlib.reload(kernels)
    else:
        del sys.modules[kernels.__name__]
        kernels = w.load("kernels")
    assert kernels.scale(1) == 20 and state(registry) == ("applied", "")
    registry.disable()
    assert kernels.scale(1) == 2


def test_skipped_where_what_it_relies_on_has_changed(world):
    changed = "def scale(x):\n    return 2 * x\n\ndef shift(x):\n    return x - 1\n"
    w = world(**{"kernels.py": changed})
    known = of_definition(w.package / "kernels.py", "scale")
    target = Target(f"{w.name}.kernels", "scale", ">=1", (known,))
    patch = Patch("room.scale", "A", "s", (target,), lambda f: f, relies_on=(w.target("shift"),))
    registry = w.registry(patch)
    registry.enable()
    w.load("kernels")
    assert state(registry)[0] == "skipped" and f"upstream changed: {w.name}.kernels.shift" in state(registry)[1]
    assert survey([patch], {w.name: w.package}) == registry.status()


def test_superseded_where_the_tree_has_the_change(world):
    w = world(**{"kernels.py": "def scale(x):\n    return 20 * x\n"})
    with_change = of_definition(w.package / "kernels.py", "scale")
    target = w.target("scale")
    patch = Patch("room.scale", "A", "s", (replace(target, patched=(with_change,)),), lambda f: f)
    registry = w.registry(patch, strict=True)
    registry.enable()
    assert w.load("kernels").scale(1) == 20
    assert state(registry) == ("superseded", f"this {w.name} 2026.10.9 already has the change")
    assert survey([patch], {w.name: w.package}) == registry.status()


def test_one_room_off(world):
    w = world()
    registry = w.registry(w.patch(), w.patch("shift", id="other.shift"))
    registry.enable()
    kernels = w.load("kernels")
    registry.disable("other")
    assert [row.state for row in registry.status()] == ["applied", "disabled"]
    assert (kernels.scale(1), kernels.shift(1)) == (20, 2)
    registry.enable("other.shift")
    assert kernels.shift(1) == 20
    with pytest.raises(UsageError, match="no patch or room named nf5"):
        registry.disable("nf5")


def test_survey_agrees_with_the_run_time(world):
    w = world()
    patches = [
        w.patch(),
        w.patch("shift", id="room.shift", versions=">=2027.1"),
        w.patch("Loader.load", id="room.load"),
    ]
    rows = survey(patches, {w.name: w.package})
    registry = w.registry(*patches)
    registry.enable()
    w.load("kernels")
    assert [(row.state, row.reason) for row in rows] == [(row.state, row.reason) for row in registry.status()]
    assert [row.state for row in rows] == ["applied", "skipped", "applied"]


def test_survey_of_a_package_that_is_not_there(world):
    w = world()
    (row,) = survey([w.patch()], {})
    assert (row.state, row.reason) == ("skipped", f"{w.name} is not installed")
