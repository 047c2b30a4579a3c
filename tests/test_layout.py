"""The promises about the repository itself: what lies where, how long it is, who imports whom.

Small code stays small only if something fails when it grows."""

import ast
import re

import pytest
from tests import conftest
from tests.conftest import ROOT, listed_by_git, project_files

TOP = {
    "README.md", "LICENSE", "requirements.txt", ".gitignore", "prepare.py", "synth.py", "model.py",
    "train.py", "sample.py", "judge.py", "kernels", "tests", "weights", "clips", ".ci",
}  # fmt: skip
SCRIPTS = ("prepare", "synth", "model", "train", "sample", "judge")
MAY_IMPORT = {  # imports run one way only
    "prepare": set(),
    "synth": {"prepare"},
    "kernels": set(),
    "model": {"prepare", "kernels"},
    "train": {"prepare", "kernels", "model"},
    "sample": {"prepare", "kernels", "model"},
    "judge": {"prepare", "kernels", "model", "sample"},
}
PACKAGES = {"torch", "numpy", "soundfile", "tiktoken", "requests", "safetensors", "triton"}


def tracked() -> list[str]:
    listed = listed_by_git(ROOT)
    if listed is None:
        pytest.skip("not a git checkout, so what is tracked is not known")
    return [name for name in listed if (ROOT / name).exists()]


def python_files() -> list[str]:
    return [name for name in project_files() if name.endswith(".py")]


def program_files() -> list[str]:
    return [n for n in python_files() if n.split("/")[0].removesuffix(".py") in MAY_IMPORT]


def test_nothing_else_at_the_top():
    assert {name.split("/")[0] for name in tracked()} <= TOP


def test_generated_things_are_not_tracked():
    names = tracked()
    weights = [n for n in names if n.startswith("weights/") and not n.startswith("weights/tiny/")]
    clips = [n for n in names if n.startswith("clips/") and not n.endswith(".flac")]
    assert weights == clips == []
    assert len([n for n in names if n.startswith("clips/")]) in (0, 6)


def long_lines(text: str) -> list[int]:
    return [i for i, line in enumerate(text.split("\n"), 1) if len(line) > 100]


def crowded_lines(tree) -> list[int]:
    """Lines that hold the start of a second statement."""
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sorted({line for line in lines if lines.count(line) > 1})


def long_functions(tree) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 120 if node.name == "main" else 60
            if node.end_lineno - node.lineno + 1 > limit:
                found.append(node.name)
    return found


def test_lines_statements_and_functions_are_short():
    wrong = {}
    for name in python_files():
        text = (ROOT / name).read_text()
        tree = ast.parse(text)
        found = (long_lines(text), crowded_lines(tree), long_functions(tree))
        if any(found):
            wrong[name] = found
    assert wrong == {}, "lines over 100, lines with two statements, functions over 60 (main 120)"


def test_the_checks_see_what_they_look_for():
    """A guard that cannot fail guards nothing."""
    tree = ast.parse("a = 1; b = 2\nif a: b = 3\ndef f():\n" + "    a\n" * 60)
    assert crowded_lines(tree) == [1, 2]
    assert long_functions(tree) == ["f"]
    assert long_lines("x" * 101) == [1]


def imported(tree) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", program_files())
def test_imports_run_one_way(name):
    import sys

    stage = name.split("/")[0].removesuffix(".py")
    outside = imported(ast.parse((ROOT / name).read_text())) - set(sys.stdlib_module_names)
    allowed = PACKAGES | MAY_IMPORT[stage] | ({"kernels"} if stage == "kernels" else set())
    assert outside <= allowed


@pytest.mark.parametrize("codes, code", [([0, 5, 0], 0), ([0, 1], 1), ([0, -11, 0], 1)])
def test_a_file_whose_process_is_killed_fails_the_suite(codes, code):
    assert conftest.of_all(codes) == code


def test_what_belongs_to_the_project_is_known_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "listed_by_git", lambda *given: None)
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    kept = [".gitignore", "README.md", "tests/data/a.json", "weights/tiny/model.safetensors"]
    gone = [".git/config", ".venv/lib/x.py", "a/__pycache__/x.pyc", "data/toy/x", "runs/tiny/x",
            "weights/af3/config.json", "x.part"]  # fmt: skip
    for name in kept[1:] + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(project_files(tmp_path)) == kept


def test_without_git_nothing_is_listed(tmp_path, monkeypatch):
    assert listed_by_git(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed_by_git(ROOT) is None


def test_requirements_are_exactly_the_packages():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = {re.match(r"[\w-]+", line).group() for line in lines if line and line[0] != "#"}
    assert names == PACKAGES
    assert "torch==2.13.0" in lines
    assert any(line.startswith("triton==3.7.1;") for line in lines)


def test_readme_table_of_files_is_true():
    """Every script and kernel is listed with its length, at most a tenth off."""
    table = re.findall(r"^\| (`.*`) \|.*\| ([\d, ]+) \|$", (ROOT / "README.md").read_text(), re.M)
    stated = {}
    for names, lines in table:
        first, *others = re.findall(r"`([\w./]+)`", names)
        names = [first, *(f"{first.rpartition('/')[0]}/{name}" for name in others)]
        stated |= dict(zip(names, map(int, lines.split(", ")), strict=True))
    files = [name for name in program_files() if not name.endswith("__init__.py")]
    actual = {name: len((ROOT / name).read_text().split("\n")) - 1 for name in files}
    assert set(stated) == set(actual)
    off = {name: (stated[name], n) for name, n in actual.items() if abs(stated[name] - n) > n / 10}
    assert off == {}


def test_scripts_open_with_a_docstring():
    for name in program_files():
        assert ast.get_docstring(ast.parse((ROOT / name).read_text())), name
