"""The registry that every layer builds on."""

import importlib
import itertools
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from zoo import registry
from zoo.errors import ZooError, counted
from zoo.registry import Registry, nearest

numbers = itertools.count()


def fresh(modules=None):
    return Registry("toy", f"toys{next(numbers)}", modules)


@pytest.fixture
def toys(monkeypatch):
    """A registry that the modules of these tests import as `shelf.toys`; they are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "shelf", ModuleType("shelf"))
    sys.modules["shelf"].toys = toys = fresh()
    yield toys
    for name in set(sys.modules) - before - {"shelf"}:
        del sys.modules[name]


@pytest.fixture
def install(toys, tmp_path, monkeypatch):
    """Install a package as pip does: a module of this name, and the entry points that it offers."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package, code, version="1", **points):
        (tmp_path / f"{package}.py").write_text(f"from shelf import toys\n{code}\n")
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = (f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[{toys.group}]\n{''.join(lines)}")
        importlib.invalidate_caches()

    return install


BALL = "@toys.register('ball')\nclass Ball: pass\nclass Other: pass"


def test_a_name_is_taken_once():
    toys = fresh()
    toys.register("ball", int)
    toys.register("ball", int)  # the same thing again, as when a module is reloaded
    with pytest.raises(ZooError, match="toy 'ball' is registered twice: by builtins:int and by builtins:str"):
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


def test_objects_without_a_name_are_told_apart(toys):
    toys.register("ball", {"size": 1})
    with pytest.raises(ZooError, match=f"registered twice: by {__name__} and by {__name__}"):
        toys.register("ball", {"size": 2})


def test_functions_from_one_factory_are_told_apart(toys, install):
    """As the forms of operators that `triton_form` makes in two packages."""
    sys.modules["shelf"].make = lambda: lambda: None
    for package in ("ours", "theirs"):
        install(package, "from shelf import make\ntoys.register('ball', make())")
    importlib.import_module("ours")
    with pytest.raises(ZooError, match=r"by ours:.*<lambda> and by theirs:.*<lambda>"):
        importlib.import_module("theirs")


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("imported", [False, True])
def test_a_decorator_and_an_entry_point_name_the_same_object(toys, install, looked_up, imported):
    install("toybox", BALL, ball="toybox:Ball")
    if looked_up:
        assert toys.names() == ["ball"]
        assert "toybox" not in sys.modules
    if imported:
        importlib.import_module("toybox")
    for _ in range(2):
        assert "ball" in toys
        assert toys.names() == ["ball"]
        assert toys.get("ball") is sys.modules["toybox"].Ball


def test_an_entry_point_names_what_a_package_takes_from_its_module(toys, install):
    install("inner", BALL)
    install("outer", "from inner import Ball", ball="outer:Ball")
    assert toys.get("ball") is sys.modules["inner"].Ball


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize(
    "code", [BALL, "toys.register('ball', {})\nOther = {'size': 1}", "toys.register('ball', lambda: 1)\nOther = lambda: 2"]
)
def test_a_decorator_and_an_entry_point_name_different_objects(toys, install, imported, code):
    install("toybox", code, "0.3", ball="toybox:Other", kite="toybox:toys")
    if imported:
        importlib.import_module("toybox")
    for _ in range(2):
        with pytest.raises(ZooError, match=r"toy 'ball' is registered twice: by toybox.* and by toybox:Other of toybox 0.3"):
            toys.get("ball")
    assert toys.get("kite") is toys


@pytest.mark.parametrize("imported", [False, True])
def test_an_entry_point_may_not_take_a_name_of_ours(toys, install, imported):
    toys.register("ball", int)
    install("elsewhere", "class Ball: pass", ball="elsewhere:Ball")
    if imported:
        importlib.import_module("elsewhere")
    for _ in range(2):
        with pytest.raises(ZooError, match=r"registered twice: by builtins:int and by elsewhere:Ball of elsewhere 1"):
            toys.get("ball")


def test_two_packages_with_the_same_name(toys, install):
    for package in ("ours", "theirs"):
        install(package, "class Ball: pass\nclass Kite: pass", **{"ball": f"{package}:Ball", package: f"{package}:Kite"})
    assert toys.names() == ["ball", "ours", "theirs"]
    for _ in range(2):
        with pytest.raises(ZooError, match=r"'ball' is registered twice: by (ours|theirs):Ball of \1 1 and by (ours|theirs):Ball of \2 1"):
            toys.get("ball")
    assert toys.get("theirs") is sys.modules["theirs"].Kite


def test_two_packages_may_offer_one_object(toys, install):
    install("ours", BALL, ball="ours:Ball")
    install("theirs", "from ours import Ball", ball="theirs:Ball")
    assert toys.get("ball") is sys.modules["ours"].Ball


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("code", [BALL, "Ball = {}\ntoys.register('ball', Ball)"])
def test_reload(toys, install, looked_up, code):
    install("toybox", code, ball="toybox:Ball")
    module = importlib.import_module("toybox")
    before = module.Ball
    if looked_up:
        assert toys.get("ball") is before
    importlib.reload(module)
    assert toys.get("ball") is module.Ball is not before


def test_a_package_that_cannot_be_imported(toys, install):
    install("broken", "import no_such_module", "2.1", kite="broken:Kite", hoop="broken:Hoop")
    install("empty", "", ball="empty:Ball")
    toys.register("top", int)
    assert toys.names() == ["ball", "hoop", "kite", "top"]
    for _ in range(2):
        with pytest.raises(ZooError, match=r"^toy 'kite': cannot import broken:Kite of broken 2.1: ModuleNotFoundError: No module .*'$"):
            toys.get("kite")
    with pytest.raises(ZooError, match="toy 'ball': cannot import empty:Ball of empty 1: AttributeError"):
        toys.get("ball")
    assert toys.get("top") is int


def test_names_do_not_import_other_packages(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("kite", "no_such_package:Kite", "zoo_toys")])
    toys = fresh()
    assert toys.names() == ["kite"]
    with pytest.raises(ZooError, match="toy 'kite': cannot import no_such_package:Kite"):
        toys.get("kite")


@pytest.mark.parametrize(("pattern", "names"), [("shop.*", ["ball", "top"]), ("shop.*.op", ["kite", "loop"])])
def test_modules_of_a_package_register_themselves(toys, tmp_path, monkeypatch, pattern, names):
    """Also in folders that are no packages of their own, as those of operators."""
    monkeypatch.syspath_prepend(tmp_path)
    for file in ("ball", "top", "kite/op", "loop/op", "kite/example"):
        path = tmp_path / "shop" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from shelf import toys\ntoys.register({file.split('/')[0]!r}, int)\n")
    (tmp_path / "shop/__init__.py").touch()
    sys.modules["shelf"].toys = toys = fresh(pattern)
    assert toys.names() == names


def test_a_failure_to_import_what_is_ours_is_not_forgotten(toys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "workshop").mkdir()
    (tmp_path / "workshop/broken.py").write_text("raise ImportError('broken block')\n")
    toys = fresh("workshop.*")
    for _ in range(2):
        with pytest.raises(ImportError, match="broken block"):
            toys.get("ball")


def test_the_nearest_name():
    toys = fresh()
    toys.register("ball", int)
    with pytest.raises(ZooError, match=r"unknown toy 'bell'; did you mean 'ball'\? allowed: ball"):
        toys.get("bell")


@pytest.mark.parametrize(
    ("word", "allowed", "end"),
    [
        ("gpt", ["gdn", "jet"], "allowed: gdn, jet"),
        ("device", ["evict", "dtype"], "allowed: dtype, evict"),
        ("lora", ["lr", "loops"], "allowed: loops, lr"),
        ("anything", [], "allowed: nothing"),
        ("gnd", ["attn", "gdn"], "did you mean 'gdn'? allowed: attn, gdn"),
        ("n_layers", ["layers", "loops"], "did you mean 'layers'? allowed: layers, loops"),
        ("GDN", ["attn", "gdn"], "did you mean 'gdn'? allowed: attn, gdn"),
    ],
)
def test_only_a_close_name_is_offered(word, allowed, end):
    assert nearest(word, allowed) == end


def test_of_many_names_only_the_closest_are_listed():
    names = [f"toy{n}" for n in range(90, 120)]
    assert nearest("toy99x", names).startswith("did you mean 'toy99'? allowed: toy99, ")
    assert nearest("toy99x", names).endswith(" and 25 others")
    assert nearest("zzz", names).count("toy") == 5


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "token", "1 token"), (0, "token", "0 tokens"), (2, "entry", "2 entries"), (1, "pass", "1 pass"), (3, "process", "3 processes")],
)
def test_nouns_agree_with_their_number(number, noun, text):
    assert counted(number, noun) == text
