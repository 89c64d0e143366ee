"""A module that says what is public says all of it, and nothing that it has not."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    path for folder in ("minimind_data", "minimind_train", "cli") for path in (ROOT / folder).rglob("*.py")
]


def names_of(tree):
    """(what a module defines that is public, everything that it defines or imports)."""
    public, every = set(), set()
    statements = [
        statement for node in tree.body for statement in (node.body if isinstance(node, ast.If) else [node])
    ]
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            every.add(node.name)
            public |= {node.name} if not node.name.startswith("_") else set()
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            every |= {
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.ImportFrom):
            every |= {alias.asname or alias.name for alias in node.names}
    return public, every


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_all_is_what_is_public(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    (stated,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ] or [None]
    public, every = names_of(tree)
    if stated is not None:
        assert public <= set(stated) <= every


def test_tests_take_what_they_share_from_helpers_and_nothing_from_each_other():
    """A program, such as `python -m tests.mutation`, also has modules of its own, which nothing outside it imports."""
    foreign = set()
    for path in (ROOT / "tests").rglob("*.py"):
        allowed = ["tests.helpers"]
        if (path.parent / "__main__.py").is_file():
            allowed.append(".".join(path.parent.relative_to(ROOT).parts))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tests":
                package = ".".join(node.module.split(".")[:2])
                if package not in allowed:
                    foreign.add((str(path.relative_to(ROOT)), node.module))
    assert foreign == set()


def test_pytest_goes_into_every_folder_of_tests(request):
    """By default it leaves out folders called build, dist or venv, wherever they are."""
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    names = {part for folder in folders for part in folder.relative_to(ROOT).parts}
    assert "build" in names
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in left_out)]
