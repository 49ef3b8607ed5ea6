"""The plug table: every plug loads, names are unique, and a new file is found by its name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cq.core import catalog
from cq.core.errors import PlanError

ALL = [(kind, name) for kind in catalog.KINDS for name in catalog.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_plug_loads_under_its_name(kind: str, name: str) -> None:
    plug = catalog.load(kind, name)
    assert plug is not None
    if kind in {"formats", "optimizers", "stages"}:
        assert name == plug.name
    assert catalog.origin(kind, name)


def test_catalogue_holds_what_cq_ships() -> None:
    assert "int8_tensorwise" in catalog.names("formats")
    assert {"quip", "rtn"} <= set(catalog.names("optimizers"))
    assert "quant" in catalog.names("stages")
    assert "generic" in catalog.names("models")
    for kind in catalog.KINDS:
        assert list(catalog.names(kind)) == sorted(catalog.names(kind))


def test_names_import_no_plug() -> None:
    code = (
        "import sys; from cq.core import catalog\n"
        "for kind in catalog.KINDS: catalog.names(kind)\n"
        "print([m for m in sys.modules if m in ('torch', 'typer') or m.endswith('.rtn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [
        ("formats", "int8_tensorwize", "`int8_tensorwise`"),
        ("optimizers", "quipp", "`quip`"),
        ("stages", "qant", "`quant`"),
        ("optimizers", "zzzz", "there are: "),
    ],
)
def test_an_unknown_name_is_refused_with_near_names(kind: str, name: str, near: str) -> None:
    with pytest.raises(PlanError) as caught:
        catalog.load(kind, name)
    singular = kind.removesuffix("s")
    assert (caught.value.exit_code, caught.value.code) == (4, f"plan.no_{singular}")
    assert caught.value.message == f"there is no {singular} `{name}`"
    assert near in (caught.value.hint or "")


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, fresh_catalog: None) -> Install:
    """Replaces all entry points: groups and their `name="value"`."""

    def install(*points: tuple[str, str, str]) -> None:
        found = [EntryPoint(group=group, name=name, value=value) for group, name, value in points]
        monkeypatch.setattr(
            catalog, "entry_points", lambda *, group: [e for e in found if e.group == group]
        )

    return install


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes importable packages: `home("name", **{"file.py": text})`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def home(package: str, **files: str) -> None:
        directory = tmp_path / package
        directory.mkdir()
        for name, text in {"__init__.py": "", **files}.items():
            (directory / name).write_text(text)

    return home


def test_a_file_in_a_home_is_a_plug_of_that_name(
    install: Install, home: Callable[..., None]
) -> None:
    home(
        "cq_test_home_a",
        **{
            "new_one.py": "class Plug:\n    name = 'new_one'\nPLUG = Plug()\n",
            "family.toml": "version = 7\n",
            "_private.py": "1 / 0\n",
            "notes.txt": "not a plug",
        },
    )
    install(("cq.homes", "formats", "cq_test_home_a"), ("cq.homes", "models", "elsewhere"))
    assert catalog.names("formats") == ("family", "new_one")
    assert catalog.load("formats", "new_one").name == "new_one"
    assert catalog.load("formats", "family") == {"version": 7}
    assert catalog.origin("formats", "new_one") == "cq_test_home_a.new_one"


def test_two_homes_of_a_kind_add_up(install: Install, home: Callable[..., None]) -> None:
    home("cq_test_home_b", **{"one.py": "PLUG = 1"})
    home("cq_test_home_c", **{"two.py": "PLUG = 2"})
    install(("cq.homes", "formats", "cq_test_home_b"), ("cq.homes", "formats", "cq_test_home_c"))
    assert [catalog.load("formats", name) for name in catalog.names("formats")] == [1, 2]


def test_an_entry_point_is_a_plug(install: Install, home: Callable[..., None]) -> None:
    home("cq_test_home_d", **{"mod.py": "PLUG = 'module'\nthing = 'object'\n"})
    install(
        ("cq.formats", "whole", "cq_test_home_d.mod"),
        ("cq.formats", "inner", "cq_test_home_d.mod:thing"),
    )
    assert catalog.names("formats") == ("inner", "whole")
    assert catalog.load("formats", "whole") == "module"
    assert catalog.load("formats", "inner") == "object"


def test_two_plugs_of_one_name_are_refused(install: Install, home: Callable[..., None]) -> None:
    home("cq_test_home_e", **{"same.py": "PLUG = 1"})
    install(("cq.homes", "formats", "cq_test_home_e"), ("cq.formats", "same", "somebody.else:plug"))
    with pytest.raises(PlanError, match="two plugs are named `same`") as caught:
        catalog.names("formats")
    assert "cq_test_home_e.same" in caught.value.message
    assert "somebody.else:plug" in caught.value.message


def test_two_entry_points_of_one_name_are_refused(install: Install) -> None:
    install(("cq.stages", "same", "one:A"), ("cq.stages", "same", "two:B"))
    with pytest.raises(PlanError, match="two plugs are named `same`"):
        catalog.names("stages")


def test_the_same_entry_point_twice_is_one_plug(install: Install) -> None:
    """An editable install beside an older one lists everything twice."""
    install(("cq.stages", "same", "one:A"), ("cq.stages", "same", "one:A"))
    assert catalog.names("stages") == ("same",)


def test_two_homes_with_a_plug_of_one_name_are_refused(
    install: Install, home: Callable[..., None]
) -> None:
    home("cq_test_home_f", **{"same.py": "PLUG = 1"})
    home("cq_test_home_g", **{"same.py": "PLUG = 2"})
    install(("cq.homes", "formats", "cq_test_home_f"), ("cq.homes", "formats", "cq_test_home_g"))
    with pytest.raises(PlanError, match="two plugs are named `same`"):
        catalog.names("formats")


@pytest.mark.parametrize("text", ["import no_such_module_at_all\n", "NOT_PLUG = 1\n"])
def test_a_broken_plug_is_named(text: str, install: Install, home: Callable[..., None]) -> None:
    package = f"cq_test_home_h{len(text)}"
    home(package, **{"broken.py": text, "sound.py": "PLUG = 1"})
    install(("cq.homes", "formats", package))
    assert catalog.load("formats", "sound") == 1
    with pytest.raises(PlanError, match="the plug `broken`") as caught:
        catalog.load("formats", "broken")
    assert f"{package}.broken" in caught.value.message
    assert caught.value.hint


def test_a_broken_toml_plug_is_named(install: Install, home: Callable[..., None]) -> None:
    home("cq_test_home_i", **{"bad.toml": "= 3"})
    install(("cq.homes", "models", "cq_test_home_i"))
    with pytest.raises(PlanError, match="the plug `bad`"):
        catalog.load("models", "bad")
