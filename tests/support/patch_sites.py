"""Finds, in source text, every place where an integration changes an engine: what the register of patches must name.

A site is a write (``x.a = ...``, ``x[...] = ...``, ``del x.a``, ``setattr``, ``delattr``, a change of a container in
place) to an object that is not this repository's own, or a call that hands the engine code of ours (``register...``,
hooks, middleware). Own are: ``self`` in a method, one attribute deep; what a class of ours, a copy or a literal made;
parameters and attributes that are annotated with a class of ours. Whatever cannot be told counts as the engine's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOREIGN = ("vllm", "sglang", "transformers", "fastapi", "starlette")
"""Packages that may be given code of ours, and whose containers may be changed, only with an entry in a register."""
FRESH = {"copy", "deepcopy", "replace", "dict", "list", "set", "tuple", "bytearray", "vars", "zeros", "empty", "cat"}
"""Functions that make an object which nobody else has."""
KEEPS = {"values", "items", "get", "getattr", "enumerate", "zip", "list", "tuple", "reversed", "filter", "pop"}
"""Functions whose result belongs to whom their argument or object belongs."""
IN_PLACE = {"append", "insert", "extend", "remove", "update", "clear", "pop", "setdefault", "add", "discard"}
HANDS_OVER = ("register", "add_middleware", "add_attention_backend", "add_deterministic", "_ensure_registered")
"""How names of functions begin that give an engine something of ours."""


@dataclass(frozen=True, order=True)
class Site:
    """where: "module.Class.function"; what: the target of the write, or the function called; line: in the file."""

    where: str
    what: str
    line: int

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Own:
    """What the repository's own classes and functions are called, and what they are annotated with."""

    def __init__(self, files: list[Path]) -> None:
        trees = [ast.parse(path.read_text()) for path in files]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        self.makers = {f.name for f in functions if self.annotated(f.returns)} - KEEPS
        fields = [n for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, (ast.Name, ast.Attribute))]
        named = [(n.target.id if isinstance(n.target, ast.Name) else n.target.attr, n.annotation) for n in fields]
        self.attributes = {name for name, annotation in named if self.annotated(annotation)}
        self.attributes |= {  # self.x = x, of an annotated parameter
            argument.arg
            for f in functions
            if f.name == "__init__"
            for argument in f.args.args
            if self.annotated(argument.annotation)
        }

    def annotated(self, annotation: ast.expr | None) -> bool:
        """Whether an annotation names a class of the repository, and none of others but None and containers."""
        if annotation is None:
            return False
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
        return bool(names & self.classes) and names <= self.classes | {"dict", "list", "tuple", "str", "int", "None"}


class _Function:
    """One function's (or the module's) names. owned: name -> whether what it holds is the repository's own."""

    def __init__(self, node: ast.AST, outer: _Function | None, method: bool, own: Own) -> None:
        self.outer, self.own, self.imported, self.owned, self.shared = outer, own, {}, {}, set()
        arguments = getattr(node, "args", None)
        if arguments is not None:
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
                self.owned[argument.arg] = own.annotated(argument.annotation)
            if method and arguments.args:
                self.owned[arguments.args[0].arg] = True
        body = list(_own_nodes(node))
        for child in body:
            if isinstance(child, ast.Import):
                for alias in child.names:
                    self.imported[(alias.asname or alias.name).split(".")[0]] = alias.name
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    self.imported[alias.asname or alias.name] = f"{child.module}.{alias.name}"
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                self.owned[child.name] = True
        for _ in range(2):  # what is bound later may be used earlier, in a loop
            for child in body:
                self._bind(child)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._give(target, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.owned[node.target.id] = self.own.annotated(node.annotation) or (
                node.value is not None and self.is_own(node.value)
            )
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            written_out = node.iter.elts if isinstance(node.iter, (ast.Tuple, ast.List)) else [node.iter]
            for item in written_out:
                self._give(node.target, item)
        elif isinstance(node, ast.NamedExpr):
            self._give(node.target, node.value)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._give(node.optional_vars, node.context_expr)

    def _give(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            if self.owned.get(target.id) is not False:  # once the engine's, always in doubt
                self.owned[target.id] = self.is_own(value)
            if (
                isinstance(value, ast.Attribute)
                and isinstance(_root(value), ast.Name)
                and not self.is_own(_root(value))
            ):
                self.shared.add(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value] * len(target.elts)
            for one, its in zip(target.elts, values, strict=False):
                self._give(one, its)

    def find(self, name: str) -> tuple[bool | None, str | None]:
        """Whether a name's value is own, and the module path that it was imported from."""
        scope: _Function | None = self
        while scope is not None:
            if name in scope.owned:
                return scope.owned[name], None
            if name in scope.imported:
                return None, scope.imported[name]
            scope = scope.outer
        return None, None

    def is_own(self, node: ast.expr) -> bool:
        """Whether the object that an expression gives is the repository's own."""
        if isinstance(node, ast.Name):
            return bool(self.find(node.id)[0])
        if isinstance(node, ast.Attribute):
            return node.attr in self.own.attributes and self.is_own(node.value)
        if isinstance(node, (ast.Subscript, ast.Starred)):
            return self.is_own(node.value)
        if isinstance(node, ast.Call):
            name = _name(node.func)
            if name in FRESH or name in self.own.makers or name.lstrip("_")[:1].isupper():
                return True
            if name in KEEPS:
                of = node.func.value if isinstance(node.func, ast.Attribute) else node.args[0] if node.args else None
                return of is not None and self.is_own(of)
            return False
        if isinstance(node, (ast.BoolOp, ast.IfExp)):
            parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return all(self.is_own(part) for part in parts)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return all(self.is_own(part) for part in node.elts)
        if isinstance(node, ast.Dict):
            return all(self.is_own(part) for part in node.values)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            return self.is_own(node.value if isinstance(node, ast.DictComp) else node.elt)
        return isinstance(node, (ast.Constant, ast.JoinedStr, ast.Lambda, ast.BinOp, ast.Compare, ast.UnaryOp))

    def is_foreign(self, node: ast.expr) -> bool:
        """Whether an expression begins with something imported from an engine."""
        return (self._module(node) or "").split(".")[0] in FOREIGN

    def is_imported(self, node: ast.expr) -> bool:
        """Whether an expression begins with something that is imported."""
        return self._module(node) is not None

    def _module(self, node: ast.expr) -> str | None:
        while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
            node = node.func if isinstance(node, ast.Call) else node.value
        return self.find(node.id)[1] if isinstance(node, ast.Name) else None

    def is_attribute(self, name: str) -> bool:
        """Whether a local name stands for an attribute of some other object: a container that both then share."""
        return name in self.shared


def sites(path: Path, own: Own) -> list[Site]:
    """Every site of one file, in order."""
    tree = ast.parse(path.read_text())
    return sorted(set(_sites(tree, path.stem, None, False, own)))


def _sites(node: ast.AST, where: str, outer: _Function | None, method: bool, own: Own) -> Iterator[Site]:
    scope = _Function(node, outer, method, own)
    for child in _own_nodes(node):
        for what in _changes(child, scope):
            yield Site(where, what, child.lineno)
        if isinstance(child, ast.ClassDef):
            for inner in child.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield from _sites(inner, f"{where}.{child.name}.{inner.name}", scope, True, own)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _sites(child, f"{where}.{child.name}", scope, False, own)
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for decorator in child.decorator_list:
                for part in ast.walk(decorator):
                    for what in _changes(part, scope):
                        yield Site(where, what, part.lineno)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function or module, without those inside of the functions and classes in it."""
    waiting = list(ast.iter_child_nodes(node))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        waiting = list(node.body)
    while waiting:
        child = waiting.pop(0)
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            waiting[:0] = ast.iter_child_nodes(child)


def _changes(node: ast.AST, scope: _Function) -> Iterator[str]:
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
        for target in _flat(targets):
            if isinstance(node, ast.AugAssign) and isinstance(target, ast.Name):
                if scope.find(target.id)[0] is False and isinstance(node.value, (ast.List, ast.ListComp)):
                    yield ast.unparse(target)  # a list that was handed in grows
            elif _is_write(target, scope):
                yield ast.unparse(target)
    elif isinstance(node, ast.Call):
        yield from _calls(node, scope)


def _calls(node: ast.Call, scope: _Function) -> Iterator[str]:
    name, func = _name(node.func), node.func
    arguments = node.args
    if any(isinstance(one, ast.Name) and one.id in ("setattr", "delattr") for one in arguments):  # a callback
        yield ast.unparse(func) + "(setattr)"
    if name in ("setattr", "delattr", "__setattr__", "__delattr__"):
        target = arguments[0]
        if not scope.is_own(target):
            yield f"{name}({ast.unparse(target)}, {ast.unparse(arguments[1])})"
    elif name.startswith(HANDS_OVER) or "forward_pre_hook" in name or name == "register_forward_hook":
        given = isinstance(func, ast.Attribute) and not scope.is_imported(func) and not scope.is_own(func.value)
        if scope.is_foreign(func) or given:
            yield ast.unparse(func)
    elif name in IN_PLACE and isinstance(func, ast.Attribute):
        held = func.value
        attribute = isinstance(held, ast.Attribute) or (isinstance(held, ast.Name) and scope.is_attribute(held.id))
        if scope.is_foreign(held) or (attribute and not scope.is_own(_root(held))):
            yield ast.unparse(func)


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


def _is_write(target: ast.expr, scope: _Function) -> bool:
    """Whether a target of an assignment lies in an object that is not the repository's own."""
    if isinstance(target, ast.Attribute):
        if target.attr in ("__class__", "__dict__"):
            return True
        return not scope.is_own(target.value)
    if isinstance(target, ast.Subscript):
        held = target.value  # x[...] or x.a[...]
        if isinstance(held, ast.Attribute):
            return held.attr == "__dict__" or not scope.is_own(held.value)
        return isinstance(held, ast.Name) and scope.find(held.id)[0] is None and scope.is_foreign(held)
    return False


def _flat(targets: list[ast.expr]) -> Iterator[ast.expr]:
    for target in targets:
        if isinstance(target, (ast.Tuple, ast.List)):
            yield from _flat(target.elts)
        else:
            yield target.value if isinstance(target, ast.Starred) else target


def _name(func: ast.expr) -> str:
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def private_names(paths: list[Path], ours: list[Path]) -> set[str]:
    """Private names of an engine that files use: imported, looked up as an attribute, or by ``getattr``.

    ours: files of the repository; what is defined or set in them is not an engine's.
    """
    defined: set[str] = set()
    for node in (node for path in ours for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    used: set[str] = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and _name(node.func) in ("getattr", "hasattr"):
            used |= {one.value for one in node.args[1:2] if isinstance(one, ast.Constant)}
    return {name for name in used - defined if name.startswith("_") and not name.startswith("__")}
