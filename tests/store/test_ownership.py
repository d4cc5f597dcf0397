"""Nobody outside the stores writes what a store holds."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvcomp
from kvcomp.store import KVStore
from kvcomp.store.gpu.rows import Row, Table
from kvcomp.store.gpu.store import GPUStore
from kvcomp.store.gpu.tail import Tail
from kvcomp.store.rows import Rows

SOURCE = Path(str(kvcomp.__file__)).parent
OTHERS = {  # of other classes
    ("fit/statistics.py", "sums.tokens"),
    ("integrations/vllm/worker.py", "layer.impl.pages"),
}
CHANGING = {  # a list or an array
    "append", "clear", "extend", "fill", "insert", "pop", "put", "remove", "resize", "reverse", "sort", "update",
}  # fmt: skip


def own_fields(tree: ast.AST) -> Iterator[str]:
    """What classes annotate, and what their methods assign to ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


HOLDERS = KVStore, GPUStore, Rows, Row, Table, Tail
FIELDS = {name for holder in HOLDERS for name in own_fields(ast.parse(inspect.getsource(holder)))}


def changed(node: ast.AST) -> list[ast.AST]:
    """What a piece of code assigns, deletes or lets change itself, whole or in part."""
    if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return [node]
    if not isinstance(node, ast.Call):
        return []
    if ast.unparse(node.func) in ("setattr", "delattr"):
        names = (x.value for x in ast.walk(node.args[1]) if isinstance(x, ast.Constant))
        return [ast.Attribute(node.args[0], str(name), ast.Store()) for name in names]
    found: list[ast.AST] = [keyword.value for keyword in node.keywords if keyword.arg == "out"]
    if isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in CHANGING or (name.endswith("_") and not name.endswith("__")):  # such as torch's fill_
            found.append(node.func.value)
    return found


def written(source: str) -> Iterator[str]:
    """Fields called as a store's are, of anything but the writer itself."""
    for node in ast.walk(ast.parse(source)):
        for target in changed(node):
            while isinstance(target, ast.Subscript):
                target = target.value
            if isinstance(target, ast.Attribute) and target.attr in FIELDS and ast.unparse(target.value) != "self":
                yield ast.unparse(target)


def test_only_stores_write_the_fields_of_stores() -> None:
    outside = [path for path in SOURCE.rglob("*.py") if SOURCE / "store" not in path.parents]
    assert len(outside) > 80
    found = {
        (path.relative_to(SOURCE).as_posix(), field)
        for path in outside
        for field in written(path.read_text(encoding="utf-8"))
    }
    assert found == OTHERS


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ("any.tokens = 1", "any.tokens"),
        ("self.layer.store.tail_base += 1", "self.layer.store.tail_base"),
        ("x.tail_k, y = 1, 2", "x.tail_k"),
        ("x.rows.count[0] = 1", "x.rows.count"),
        ("x.tail_k[:, 0][1:] = 1", "x.tail_k"),
        ("del x.owners[0][1:]", "x.owners"),
        ("x.owners[0].append(1)", "x.owners"),
        ("x.tail_k[0].fill_(1)", "x.tail_k"),
        ("np.add(1, 2, out=x.starts[1:])", "x.starts"),
        ("setattr(x, 'sinks_k', 1)", "x.sinks_k"),
    ],
)
def test_every_way_to_write_a_field_is_seen(source: str, field: str) -> None:
    assert list(written(source)) == [field]


@pytest.mark.parametrize(
    "source", ["self.tokens = 1", "x.store = y", "x.append(1)", "y = x.rows.count[0]", "x.rows.__len__()"]
)
def test_what_is_a_stores_business_or_ones_own_is_no_writing(source: str) -> None:
    assert list(written(source)) == []


def test_only_stores_make_a_store_without_its_constructor() -> None:
    made = {path.parent.name for path in SOURCE.rglob("*.py") if "object.__new__(" in path.read_text(encoding="utf-8")}
    assert made <= {"store", "gpu"}
