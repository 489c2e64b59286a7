"""The rules of docs/architecture.md that a program can check: directions of imports, circles, and sizes."""

import ast
from pathlib import Path

import pytest
from paths import CONVERSION, EXAMPLES, ROOT

import vivit_hf


PACKAGE = Path(vivit_hf.__file__).parent
FOUNDATION = {"data", "initialisation", "hub"}
# What each wing may import besides its own modules and the root.
ALLOWED = {
    "root": set(),
    **{wing: set() for wing in FOUNDATION},
    "inference": FOUNDATION,
    "conversion": {"inference", *FOUNDATION},  # an export quantises as `optimize` does, and compares answers
    "explain": {"inference", *FOUNDATION},
    "serving": {"inference", *FOUNDATION},
    "training": {"inference", "explain", "conversion", *FOUNDATION},
    "cli": {"training", "inference", "explain", "serving", "conversion", *FOUNDATION},
}
MOST_ROOMS = 30
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60

LONG_FILES = {"src/vivit_hf/modeling_vivit.py"}  # one file, as every model in transformers

MODULES = {
    ".".join(("vivit_hf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SCRIPTS = [path for folder in (CONVERSION, EXAMPLES) for path in sorted(folder.rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*MODULES.values(), *SCRIPTS]}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def wing_of(module):
    """The wing of a module, "root" for the flat files, "entry" for `__init__` and `__main__` of the package."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return "entry"
    return parts[1] if (PACKAGE / parts[1]).is_dir() else "root"


def imports(module):
    """(imported module, whether relative, node) of every import of the package, at any level of the module."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.Import):
            found += [(alias.name, False, node) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = f"{base}.{alias.name}" in MODULES
                found.append((f"{base}.{alias.name}" if is_module else base, node.level > 0, node))
    return [one for one in found if one[0].split(".")[0] == "vivit_hf"]


def optional_imports(module):
    """The import statements in a `try` that `except ImportError` follows."""
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.Try):
            caught = {getattr(handler.type, "id", None) for handler in node.handlers}
            if caught == {"ImportError"}:
                yield from (part for statement in node.body for part in ast.walk(statement))


def test_every_wing_has_a_place_in_the_order_of_imports():
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert wings == ALLOWED.keys() - {"root"}


@pytest.mark.parametrize("wing", sorted(ALLOWED))
def test_imports_run_one_way(wing):
    for module in MODULES:
        for imported, _, _ in imports(module) if wing_of(module) == wing and wing != "root" else ():
            assert wing_of(imported) in {wing, "root", "entry", *ALLOWED[wing]}, f"{module} imports {imported}"


def test_a_root_file_imports_wings_only_where_the_package_may_be_missing():
    """By the absolute name: transformers takes the relative one for a file, and copies no folder."""
    for module in MODULES:
        optional = set(optional_imports(module)) if wing_of(module) == "root" else ()
        for imported, is_relative, node in imports(module) if wing_of(module) == "root" else ():
            if is_relative:
                assert wing_of(imported) == "root" and node.level == 1 and node.module, f"{module} imports {imported}"
            else:
                assert node in optional, f"{module} imports {imported} outside of `try: ... except ImportError`"


def test_no_import_circle():
    """Imports inside functions and for type checkers count as well."""
    edges = {module: {imported for imported, _, _ in imports(module)} for module in MODULES}
    left = dict(edges)
    while leaves := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, f"a circle among {sorted(left)}"


def test_the_package_has_few_rooms():
    assert len([*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py")]) <= MOST_ROOMS


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert {name for name, lines in lengths.items() if lines > MOST_FILE_LINES} <= LONG_FILES


def test_functions_are_short():
    too_long = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                has_docstring = ast.get_docstring(node) is not None
                docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
                lines = node.end_lineno - node.lineno + 1 - docstring
                if lines > MOST_FUNCTION_LINES:
                    too_long[f"{name_of(path)} {node.name}"] = lines
    assert not too_long


def test_state_travels_in_typed_objects():
    found = set()
    for path in MODULES.values():
        names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(TREES[path])}
        if names & {"SimpleNamespace", "locals"}:
            found.add(name_of(path))
    assert not found
