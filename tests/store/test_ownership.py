"""Nobody outside the stores writes what a store holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kvcomp

SOURCE = Path(str(kvcomp.__file__)).parent
STORES = {"store", "stores", "whole", "twin", "joined"}  # what a store is called


def written(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes that are assigned, with what they are of."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) else []:
            for part in ast.walk(target) if target is not None else []:
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    yield part


def test_only_stores_write_the_fields_of_stores() -> None:
    outside = [path for path in SOURCE.rglob("*.py") if SOURCE / "store" not in path.parents]
    assert len(outside) > 80
    found = [
        f"{path.relative_to(SOURCE)}:{part.lineno}"
        for path in outside
        for part in written(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(part.value, ast.Name) and part.value.id in STORES
    ]
    assert found == []


def test_only_stores_make_a_store_without_its_constructor() -> None:
    made = {path.parent.name for path in SOURCE.rglob("*.py") if "object.__new__(" in path.read_text(encoding="utf-8")}
    assert made <= {"store", "gpu"}
