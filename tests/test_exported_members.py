"""The faces of the packages: what `__all__` names is there, is imported late, and is what a type checker sees."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import minimind_data
import minimind_train

FACES = [minimind_data, minimind_train]
EVERY_FACE = pytest.mark.parametrize("package", FACES, ids=lambda package: package.__name__)
NOT_BY_AN_IMPORT = {"__version__"}


@EVERY_FACE
def test_all_names_are_there(package):
    assert package.__all__ == [name for name in package.__all__ if hasattr(package, name)]
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    names: dict = {}
    exec(f"from {package.__name__} import *", names)  # noqa: S102
    assert set(package.__all__) <= names.keys()
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'tokenise'"):
        package.tokenise  # noqa: B018


@EVERY_FACE
def test_a_type_checker_sees_the_same_names(package):
    tree = ast.parse(Path(package.__file__).read_text("utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == package._MODULE_OF
    assert seen.keys() == set(package.__all__) - NOT_BY_AN_IMPORT
    for name, module in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_importing_a_face_imports_nothing():
    program = (
        "import sys, minimind_data, minimind_train; "
        "heavy = {'numpy', 'pyarrow', 'tokenizers', 'torch'} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@EVERY_FACE
def test_a_sub_package_says_what_it_is_and_holds_nothing(package):
    for path in Path(package.__file__).parent.glob("*/__init__.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path
