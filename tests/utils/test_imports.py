"""Imports that are followed without running a file."""

import pytest

from fpn_ablate.utils.imports import closure, imports_of


@pytest.fixture
def package(tmp_path):
    """`package(name=source)` -> the folder of a package with these modules; `__` stands for a folder."""

    def write(**sources):
        for name, source in sources.items():
            file = tmp_path / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)
        return {"pkg": tmp_path}

    return write


def test_all_forms_of_an_import_are_followed(package):
    roots = package(
        a="import pkg.b\nfrom pkg import c\nfrom .d import x\ndef f():\n    from . import e\n",
        b="import torch, other.pkg\n",
        c="import pkg.a\n",
        d="if TYPE_CHECKING:\n    from .sub.f import y\n",
        e="raise SystemExit\n",
        sub__f="from ..g import z\n",
        g="",
        unused="",
    )
    (roots["pkg"] / "sub" / "__init__.py").write_text("import pkg.h")
    package(h="")
    followed = closure(["pkg.a"], roots)
    assert set(followed) == {"pkg.a", "pkg.b", "pkg.c", "pkg.d", "pkg.e", "pkg.sub", "pkg.sub.f", "pkg.g", "pkg.h"}
    assert followed["pkg.sub"] == roots["pkg"] / "sub" / "__init__.py"


def test_a_module_that_is_left_out_takes_along_what_it_alone_imports(package):
    roots = package(a="import pkg.b, pkg.c", b="import pkg.d, pkg.e", c="import pkg.e", d="", e="")
    assert set(closure(["pkg.a"], roots, skip=lambda module: module == "pkg.b")) == {"pkg.a", "pkg.c", "pkg.e"}
    assert closure(["pkg.a"], roots, skip=lambda module: True) == {}


def test_a_name_may_be_a_module_or_in_one(package):
    roots = package(a="from pkg.b import c, d\n", b="")
    assert set(closure(["pkg.a"], roots)) == {"pkg.a", "pkg.b"}
    assert set(imports_of(roots["pkg"] / "a.py", "pkg.a")) == {"pkg.b", "pkg.b.c", "pkg.b.d"}


def test_a_file_that_is_no_python_is_named(package):
    with pytest.raises(SyntaxError) as error:
        closure(["pkg.a"], package(a="def"))
    assert error.value.filename.endswith("a.py")
