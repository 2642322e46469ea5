"""The shape of the source tree: no import circle, no over-full folder, no long module without a reason.

Also a script, ``python tests/test_structure.py``, which needs the standard library alone.

An import counts wherever it stands: at the top, within a function, or for typing only.  A module may be longer than
:data:`MOST_LINES` when its docstring has a line ``Length: 520 lines; the reason.`` and it is no longer than that.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sglp_deploy", "exporters/sglp_exporters", "bench/sglp_bench")
MOST_MODULES = 15
MOST_LINES = 400

Graph = Mapping[str, frozenset[str]]

_LENGTH = re.compile(r"^Length: (\d+) lines; (\S.*)$", re.MULTILINE)


def modules_of(packages: Iterable[Path]) -> dict[str, Path]:
    """Every module below ``packages`` by its dotted name; a package stands for its ``__init__``."""
    found = {}
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            parts = (package.name, *file.relative_to(package).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def import_graph(modules: Mapping[str, Path]) -> Graph:
    """Which of ``modules`` each of them imports, whatever for.

    ``from package import name`` is an import of the module ``package.name`` where there is one, else of ``package``.
    That Python runs a package's ``__init__`` before a module in it is no import: nobody wrote it.
    """
    return {
        name: frozenset(_imported(name, file, modules)) - ({name} if file.name == "__init__.py" else set())
        for name, file in modules.items()
    }


def _imported(name: str, file: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package itself, and an ``__init__`` is its package.
            above = name.split(".")[: len(name.split(".")) - node.level + (file.name == "__init__.py")]
            base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for each in wanted:
            known = each
            while known and known not in modules:
                known = known.rpartition(".")[0]
            if known:
                yield known


def circles(graph: Graph) -> list[tuple[str, ...]]:
    """The shortest circle through the first module of each group of modules that reach one another, first name first.

    Every circle lies within one such group, so none is left when this is empty.
    """
    found, seen = [], set[str]()
    for start in sorted(graph):
        if start in seen:
            continue
        path = _shortest_way_back(graph, start)
        if path is not None:
            found.append(path)
            reached = _reachable(graph, start)
            seen |= {each for each in reached if start in _reachable(graph, each)}
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    reached, edge = set[str](), [start]
    while edge:
        for following in graph[edge.pop()] - reached:
            reached.add(following)
            edge.append(following)
    return reached


def _shortest_way_back(graph: Graph, start: str) -> tuple[str, ...] | None:
    paths = [(start,)]
    seen: set[str] = set()
    while paths:
        longer = []
        for path in paths:
            for following in sorted(graph[path[-1]]):
                if following == start:
                    return (*path, start)
                if following not in seen:
                    seen.add(following)
                    longer.append((*path, following))
        paths = longer
    return None


def over_full(folders: Iterable[Path]) -> list[str]:
    """Folders at or below ``folders`` that hold more than :data:`MOST_MODULES` modules, with their number."""
    counts: dict[Path, int] = {}
    for top in folders:
        for file in top.rglob("*.py"):
            counts[file.parent] = counts.get(file.parent, 0) + 1
    return [f"{folder}: {count} modules" for folder, count in sorted(counts.items()) if count > MOST_MODULES]


def too_long(modules: Iterable[Path]) -> dict[Path, str]:
    """What is wrong with the length of each of ``modules``, where something is."""
    faults = {}
    for file in modules:
        text = file.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        stated = _LENGTH.search(ast.get_docstring(ast.parse(text)) or "")
        if stated is None and lines > MOST_LINES:
            faults[file] = f"{lines} lines and no reason; cut it, or say why in its docstring: 'Length: N lines; why.'"
        elif stated is not None and lines > int(stated.group(1)):
            faults[file] = f"{lines} lines, and its docstring allows {stated.group(1)}"
        elif stated is not None and lines <= MOST_LINES:
            faults[file] = f"{lines} lines; that needs no reason any more, so drop the line from its docstring"
    return faults


def contract_faults(root: Path) -> list[str]:
    """What the import contracts in ``pyproject.toml`` leave out: a package without layers, or layers with gaps."""
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = declared["tool"]["importlinter"]["contracts"]
    faults = []
    for package in ("sglp_deploy", "sglp_bench"):
        own = [each for each in contracts if each["type"] == "layers" and package in each.get("containers", ())]
        if not any(each.get("exhaustive") is True for each in own):
            faults.append(f"contracts: the rooms of {package} are no exhaustive layers")
    return faults


def format_faults(graph: Graph) -> list[str]:
    """Imports between format folders; what formats share lies in ``onnx`` and ``runners``, and neither knows one."""
    shared = ("onnx", "runners")
    faults = []
    for importer, imported in graph.items():
        for each in sorted(imported):
            own, other = importer.split(".")[1:2], each.split(".")[1:2]
            if not (importer.startswith("sglp_exporters.") and each.startswith("sglp_exporters.")) or own == other:
                continue
            if other[0] not in shared or own == ["runners"]:
                faults.append(f"formats: {importer} imports {each}")
    return faults


def faults_of(root: Path) -> list[str]:
    """Everything that is wrong with the tree in ``root``."""
    modules = modules_of(root / package for package in PACKAGES)
    graph = import_graph(modules)
    faults = [f"import circle: {' -> '.join(circle)}" for circle in circles(graph)]
    faults += contract_faults(root) + format_faults(graph)
    faults += [f"over-full folder: {line}" for line in over_full([*(root / each for each in PACKAGES), root / "tests"])]
    long = {file.relative_to(root).as_posix(): words for file, words in too_long(modules.values()).items()}
    return faults + [f"{path}: {words}" for path, words in sorted(long.items())]


# ---------------------------------------------------------------------------------------------------- the source tree


def test_the_source_tree_has_no_circle_no_over_full_folder_and_no_long_module_without_a_reason() -> None:
    assert faults_of(ROOT) == []


def test_the_three_packages_were_looked_at_and_their_imports_seen() -> None:
    graph = import_graph(modules_of(ROOT / package for package in PACKAGES))
    assert {name.partition(".")[0] for name in graph} == {"sglp_deploy", "sglp_exporters", "sglp_bench"}
    assert "sglp_deploy._io" in graph["sglp_deploy.artifact"]


# ------------------------------------------------------------------------------------------ faults put in on purpose


def tree(folder: Path, files: Mapping[str, str]) -> Graph:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return import_graph(modules_of([folder / "p"]))


def test_a_circle_is_named_whatever_kind_of_import_closes_it(tmp_path: Path) -> None:
    graph = tree(
        tmp_path,
        {
            "p/__init__.py": "",
            "p/a.py": "import p.b\n",
            "p/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.sub.c import thing\n",
            "p/sub/__init__.py": "",
            "p/sub/c.py": "def late():\n    from .. import a\n    return a\n",
            "p/d.py": "from p import a, sub\n",
        },
    )
    assert graph["p.sub.c"] == {"p.a"}
    assert circles(graph) == [("p.a", "p.b", "p.sub.c", "p.a")]


def test_a_circle_through_a_package_and_two_circles_apart_are_each_found(tmp_path: Path) -> None:
    graph = tree(
        tmp_path,
        {
            "p/__init__.py": "",
            "p/one/__init__.py": "from p.one.user import use\n",
            "p/one/user.py": "from p.one import something\n",
            "p/x.py": "from . import y\n",
            "p/y.py": "from .x import name\n",
        },
    )
    assert circles(graph) == [("p.one", "p.one.user", "p.one"), ("p.x", "p.y", "p.x")]


def test_modules_of_a_package_that_import_one_another_in_one_direction_are_no_circle(tmp_path: Path) -> None:
    graph = tree(
        tmp_path,
        {
            "p/__init__.py": "from p.a import name\nfrom .b import other\n",
            "p/a.py": "from p import b\nfrom p.b import other\n",
            "p/b.py": "import os.path\n",
        },
    )
    assert graph == {"p": {"p.a", "p.b"}, "p.a": {"p.b"}, "p.b": set()}
    assert circles(graph) == []


def test_a_folder_of_sixteen_modules_is_over_full_and_one_of_fifteen_is_not(tmp_path: Path) -> None:
    tree(tmp_path, {f"p/full/m{number}.py": "" for number in range(16)})
    tree(tmp_path, {f"p/m{number}.py": "" for number in range(15)})
    assert over_full([tmp_path / "p"]) == [f"{tmp_path / 'p/full'}: 16 modules"]


def test_a_long_module_needs_a_reason_and_may_not_outgrow_the_number_beside_it(tmp_path: Path) -> None:
    said = '"""Does something.\n\nLength: 410 lines; a table that cannot be cut.\n"""\n'
    tree(
        tmp_path,
        {
            "p/fits.py": "x = 1\n" * 400,
            "p/long.py": "x = 1\n" * 401,
            "p/reasoned.py": said + "x = 1\n" * 406,
            "p/outgrown.py": said + "x = 1\n" * 407,
            "p/shrunk.py": said + "x = 1\n" * 396,
            "p/unreasoned.py": said.replace(" a table that cannot be cut.", "") + "x = 1\n" * 406,
        },
    )
    faults = {file.name: words for file, words in too_long(sorted((tmp_path / "p").glob("*.py"))).items()}
    assert sorted(faults) == ["long.py", "outgrown.py", "shrunk.py", "unreasoned.py"]
    assert faults["long.py"].startswith("401 lines and no reason; cut it")
    assert faults["outgrown.py"] == "411 lines, and its docstring allows 410"
    assert faults["shrunk.py"].startswith("400 lines; that needs no reason any more")


def test_a_whole_tree_is_judged(tmp_path: Path) -> None:
    layers = "[[tool.importlinter.contracts]]\ntype = 'layers'\ncontainers = ['sglp_deploy']\nexhaustive = true\n"
    files = {
        "pyproject.toml": layers,
        "exporters/sglp_exporters/gguf/exporter.py": "from sglp_exporters.vllm import exporter\n",
        "exporters/sglp_exporters/vllm/exporter.py": "from sglp_exporters.onnx import runner\n",
        "exporters/sglp_exporters/onnx/runner.py": "",
        "exporters/sglp_exporters/runners/rows.py": "from sglp_exporters.onnx import runner\n",
        "sglp_deploy/a.py": "import sglp_exporters.b\n",
        "exporters/sglp_exporters/b.py": "def late():\n    import sglp_deploy.a\n",
        "bench/sglp_bench/long.py": "\n" * 401,
        **{f"tests/room/test_{number}.py": "" for number in range(16)},
    }
    tree(tmp_path, files)
    circle, contract, *formats, folder, length = faults_of(tmp_path)
    assert contract == "contracts: the rooms of sglp_bench are no exhaustive layers"
    assert formats == [
        "formats: sglp_exporters.gguf.exporter imports sglp_exporters.vllm.exporter",
        "formats: sglp_exporters.runners.rows imports sglp_exporters.onnx.runner",
    ]
    assert circle == "import circle: sglp_deploy.a -> sglp_exporters.b -> sglp_deploy.a"
    assert folder == f"over-full folder: {tmp_path / 'tests/room'}: 16 modules"
    assert length.startswith("bench/sglp_bench/long.py: 401 lines and no reason")


if __name__ == "__main__":
    found = faults_of(ROOT)
    print("\n".join(found) or "no import circle, no over-full folder, no long module without a reason")
    sys.exit(1 if found else 0)
