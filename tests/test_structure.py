"""The floors of the design: who may import whom, how long a file may be, what may lie where."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "kvc").rglob("*.py"))
TOP = {"pyproject.toml", "Makefile", "README.md", "LICENSE", "configs", "kvc", "experiments", "tests", "data", ".ci"}

# A room may import itself, what is listed here, and nothing else of kvc.
BOTTOM = {"errors", "messages", "core"}
ALLOWED = {
    "errors": set(),
    "messages": set(),
    "core": {"errors", "messages"},
    "cache": BOTTOM,
    "eviction": BOTTOM | {"cache", "generation"},
    "generation": BOTTOM | {"cache"},
    "data": BOTTOM,
    "methods": BOTTOM | {"cache", "eviction", "generation", "data"},
    "scoring": BOTTOM | {"data"},
    "runs": {"", "errors", "messages", "core.files"},
    "callbacks": BOTTOM | {"runs"},
    "sweep": {"runs", "errors", "messages", "core.files"},
    "report": {"runs", "errors", "messages", "core.files"},
    "loading": BOTTOM | {"runs"},
    "commands": BOTTOM
    | {"cache", "eviction", "generation", "data", "methods", "report", "scoring", "sweep", "runs", "loading"}
    | {"planning", "__main__", ""},
    "parser": BOTTOM,
    "compose": {"errors", "runs"},
    "planning": {"errors", "runs", "cli", "sweep.plan", "__main__"},
    "cli": BOTTOM | {"callbacks", "runs", "data", "methods", "parser", "compose"},
    "__main__": {"", "errors"},
    "": {"errors", "loading"},
}


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything of kvc that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module == "kvc":
                names = [f"kvc.{a.name}" if is_part(a.name) else "kvc" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(node.lineno, name) for name in names if name == "kvc" or name.startswith("kvc.")]
    return found


def is_part(name: str) -> bool:
    return (ROOT / "kvc" / name).is_dir() or (ROOT / "kvc" / f"{name}.py").is_file()


def room_of(dotted: str) -> str:
    """`core` for `kvc.core.files`; the empty name for kvc itself."""
    return dotted.split(".")[1] if "." in dotted else ""


def dotted_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_floors(path: Path) -> None:
    room = room_of(dotted_of(path))
    assert room in ALLOWED, f"the design has no room kvc/{room}"
    for line, name in imports(path):
        inside, other = name.removeprefix("kvc").removeprefix("."), room_of(name)
        fine = other == room or other in ALLOWED[room] or inside in ALLOWED[room]
        assert fine, f"{path.relative_to(ROOT)}:{line}: kvc.{room} must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kvc" / "methods").rglob("*.py")), ids=lambda path: path.parts[-2:])
def test_methods_do_not_import_each_other(path: Path) -> None:
    parts = dotted_of(path).split(".")
    for line, name in imports(path):
        other = name.split(".")
        if other[:2] == ["kvc", "methods"]:
            assert len(parts) > 2, f"{path}:{line}: the package of methods imports {name}"
            assert other[:3] == parts[:3], f"{path}:{line}: {name} belongs to another method"


def test_errors_and_files_are_at_the_bottom() -> None:
    assert imports(ROOT / "kvc" / "errors.py") == []
    assert imports(ROOT / "kvc" / "core" / "files.py") == []


def test_imports_make_no_circle() -> None:
    """At import time, that is: what a function imports when it runs may point anywhere the floors allow."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = set()
        for node in body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvc."):
                names |= {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
        graph[dotted_of(path)] = names
    graph = {name: {n for n in names if n in graph and n != name} for name, names in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_is_longer_than_500_lines() -> None:
    files = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert long == {}


def test_only_the_tree_of_the_design_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_remote_code_runs(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle", "joblib"}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in {"pickle", "dill", "cloudpickle", "joblib"}
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("trust_remote_code", "False") == "False"
            if ast.unparse(node.func) == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            if ast.unparse(node.func) in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle", "False") == "False"
            assert ast.unparse(node.func) not in {"eval", "exec", "yaml.load", "yaml.unsafe_load"}
