"""The shape of the code: what a reader may rely on without looking."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ds_longft"
LONGEST_LINES = 80
CONVENTIONS = {"__init__", "__main__", "command", "commands"}
"""Names of files that say what a file is for its folder."""


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_LINES
    ]
    assert long == []


def test_a_module_has_a_name_of_its_own() -> None:
    """Among the packages too: `from x import plan` leads to one place."""
    files = [path.stem for path in PACKAGE.rglob("*.py") if path.stem not in CONVENTIONS]
    folders = [path.parent.name for path in PACKAGE.rglob("__init__.py")]
    assert [name for name, count in Counter(files + folders).items() if count > 1] == []


def test_kernels_of_triton_have_no_annotations_it_cannot_read() -> None:
    """Triton takes any but `tl.constexpr` for a global variable: compiling ends there, on a GPU only."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                given = [a.annotation for a in function.args.args if a.annotation is not None]
                wrong += [f"{path.name}: {function.name}" for a in given if ast.unparse(a) != "tl.constexpr"]
    assert not wrong
