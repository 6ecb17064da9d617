"""The registry that every floor builds on."""

import itertools
from importlib.metadata import EntryPoint

import pytest

from zoo import registry
from zoo.errors import ZooError
from zoo.registry import Registry

numbers = itertools.count()


def fresh(populate=None):
    return Registry("toy", f"toys{next(numbers)}", populate)


def test_a_name_is_taken_once():
    toys = fresh()
    toys.register("ball", int)
    toys.register("ball", int)  # the same thing again, as when a module is reloaded
    with pytest.raises(ZooError, match="toy 'ball' is registered twice"):
        toys.register("ball", str)
    assert toys.get("ball") is int


def test_a_module_imported_again_brings_its_own():
    def source():
        def ball():
            pass

        return ball

    toys = fresh()
    for ball in (source(), source()):
        toys.register("ball", ball)
        assert toys.get("ball") is ball


def test_an_entry_point_may_not_take_a_name_of_ours(monkeypatch):
    point = EntryPoint("ball", "elsewhere:Ball", "zoo_toys")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    toys = fresh()
    toys.register("ball", int)
    for _ in range(2):
        with pytest.raises(ZooError, match="registered twice: here and by elsewhere:Ball"):
            toys.get("ball")


def test_names_do_not_import_other_packages(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("kite", "no_such_package:Kite", "zoo_toys")])
    toys = fresh()
    assert toys.names() == ["kite"]
    with pytest.raises(ModuleNotFoundError):
        toys.get("kite")


def test_a_failure_to_import_what_is_ours_is_not_forgotten():
    def populate():
        raise ImportError("broken block")

    toys = fresh(populate)
    for _ in range(2):
        with pytest.raises(ImportError, match="broken block"):
            toys.get("ball")


def test_the_nearest_name():
    toys = fresh()
    toys.register("ball", int)
    with pytest.raises(ZooError, match=r"unknown toy 'bell'; did you mean 'ball'\? allowed: ball"):
        toys.get("bell")
