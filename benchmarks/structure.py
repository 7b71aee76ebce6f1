"""Prints the size and the shape of `helpers/`, read from its source alone.

    python benchmarks/structure.py          # the figures
    python benchmarks/structure.py --tree   # each level with its modules

`tests/test_structure.py` holds the bounds.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = "helpers.__main__"


@cache
def modules() -> dict[str, ast.Module]:
    """Returns `{dotted name: tree}` of all modules, packages by their `__init__`."""
    trees = {}
    for path in sorted((ROOT / "helpers").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def is_package(name: str) -> bool:
    """Returns whether a dotted name is a package."""
    return (ROOT / Path(*name.split("."))).is_dir()


def targets(node: ast.AST) -> Iterator[str]:
    """Yields the modules of ours that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name in modules())
    elif isinstance(node, ast.ImportFrom) and node.module in modules():
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in modules() else home(node.module, alias.name)


def home(package: str, name: str) -> str:
    """Returns the module that defines a name which a package exports lazily."""
    for file, names in exports(package).items():
        if name in names:
            return f"{package}.{file}"
    return package


def exports(package: str) -> dict[str, list[str]]:
    """Returns `{module: names}` that a package's `__init__` hands on."""
    for node in modules()[package].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXPORTS":
            return ast.literal_eval(node.value)
    return {}


def imports(name: str, *, hidden: bool) -> list[str]:
    """Returns what a module imports of ours, at its top or hidden in functions."""
    tree = modules()[name]
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)
    }
    nodes = (n for n in ast.walk(tree) if (id(n) in inside) == hidden)
    return [t for n in nodes for t in targets(n) if t != name]


def circles() -> list[str]:
    """Returns the modules that import themselves through others."""
    graph = {
        n: {*imports(n, hidden=False), *imports(n, hidden=True)} for n in modules()
    }

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    return [name for name in graph if name in reached(name)]


def levels() -> dict[str, int]:
    """Returns each module's level: 1 + the highest level it imports, hidden or not.

    Packages do not count: their `__init__` only hands names on.

    Raises:
        ValueError: modules import each other in a circle.
    """
    if round_trip := circles():
        raise ValueError(f"these modules import each other: {', '.join(round_trip)}")

    @cache
    def level(name: str) -> int:
        below = {*imports(name, hidden=False), *imports(name, hidden=True)}
        return 1 + max((level(b) for b in below if not is_package(b)), default=0)

    return {name: level(name) for name in modules() if not is_package(name)}


def prints(name: str) -> int:
    """Returns how often a module calls `print`."""
    calls = (n for n in ast.walk(modules()[name]) if isinstance(n, ast.Call))
    return sum(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)


def public_names() -> list[str]:
    """Returns the names that the packages export, as often as they do."""
    packages = (n for n in modules() if is_package(n))
    return [a for p in packages for names in exports(p).values() for a in names]


def figures() -> dict[str, int]:
    """Returns the figures that the project bounds."""
    files = (ROOT / "helpers").rglob("*.py")
    texts = {f: f.read_text(encoding="utf-8").count("\n") for f in files}
    names = list(modules())
    return {
        "lines": sum(texts.values()),
        "lines of masking": sum(n for f, n in texts.items() if "masking" in f.parts),
        "modules": sum(not is_package(n) for n in names),
        "packages": sum(is_package(n) for n in names) - 1,
        "modules in circles": len(circles()),
        "import levels": 0 if circles() else max(levels().values()),
        "imports hidden in functions": sum(
            len(imports(n, hidden=True)) for n in names if n != COMMAND_LINE
        ),
        "prints": sum(prints(n) for n in names if n != COMMAND_LINE),
        "public names": len(public_names()),
    }


if __name__ == "__main__":
    for title, value in figures().items():
        print(f"{value:6,} {title}")
    if "--tree" in sys.argv:
        for number in sorted(set(levels().values())):
            print(number, *(n[8:] for n, at in levels().items() if at == number))
