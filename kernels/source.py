"""Rules as source text: checked for what every backend can compile, bound anew, and written to files that are cached.

Numba and Triton both compile functions from files, and both keep what they compiled on disk beside a fingerprint of the source.
So a kernel is written out as one file that holds all it depends on and is named by its content: a changed rule is another
file, an unchanged one is found again by the next process.
"""

from __future__ import annotations

import ast
import atexit
import functools
import hashlib
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import textwrap
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedopt.kernels.math import COEFFICIENT_NAMES, RULE_NAMES

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.BitAnd, ast.BitOr)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


class RuleError(TypeError):
    """A rule that not every backend can compile; the message names the line and the remedy."""


@functools.cache
def tree(function: Callable[..., Any]) -> ast.FunctionDef:
    """Return the syntax tree of ``function``, its line numbers those of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError as error:
        raise RuleError(
            f"the source of {function!r} cannot be read, and kernels are written from it: define the rule in a file or a "
            "notebook's cell, not at a bare prompt or by exec()"
        ) from error
    node = ast.parse(textwrap.dedent("".join(lines))).body[0]
    if not isinstance(node, ast.FunctionDef):
        raise RuleError(f"{function!r} must be a plain function, written with `def`, to be a rule")
    return ast.increment_lineno(node, first - 1)


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of ``function``."""
    return tuple(argument.arg for argument in tree(function).args.args)


def helpers(function: Callable[..., Any]) -> list[types.FunctionType]:
    """Return the functions of the user's own that ``function`` calls, those that they call included, callees first."""
    found: dict[str, types.FunctionType] = {}
    for node in ast.walk(tree(function)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in COEFFICIENT_NAMES:
            helper = function.__globals__.get(node.func.id)
            if isinstance(helper, types.FunctionType) and helper is not function:
                found.update({each.__name__: each for each in (*helpers(helper), helper)})
    return list(found.values())


def check(function: Callable[..., Any], results: int | None = None, of_coefficients: bool = False) -> None:
    """Raise :class:`RuleError` unless every backend can compile ``function``.

    Args:
        function: a rule, or a function of coefficients.
        results: how many it must return as a tuple; None where that is looked at elsewhere (default: None).
        of_coefficients: whether it computes coefficients, and so may hold literals and call ``power`` (default: False).
    """
    node = tree(function)
    functions = COEFFICIENT_NAMES if of_coefficients else RULE_NAMES

    def refuse(at: ast.AST, what: str, remedy: str) -> None:
        where = f"{inspect.getsourcefile(function)}:{getattr(at, 'lineno', node.lineno)}"
        raise RuleError(f"{where}: the {'function' if of_coefficients else 'rule'} {function.__name__!r} {what}: {remedy}")

    if function.__closure__:
        names = ", ".join(f"`{name}`" for name in function.__code__.co_freevars)
        refuse(node, f"reads {names} of the function around it", "take it as a hyperparameter")
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    for statement in body[:-1]:
        if isinstance(statement, ast.If | ast.For | ast.While):
            refuse(statement, "branches or loops", "use where(condition, a, b), or make each variant a rule of its own")
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            refuse(statement, f"has the statement `{ast.unparse(statement)}`", "use plain assignments `name = expression`")
    if not body or not isinstance(body[-1], ast.Return):
        refuse(body[-1] if body else node, "does not end in `return`", "end with `return p, *states` written out")
    value = body[-1].value  # type: ignore[attr-defined]
    if results is not None and (not isinstance(value, ast.Tuple) or len(value.elts) != results):
        found = len(value.elts) if isinstance(value, ast.Tuple) else "no tuple"
        refuse(
            body[-1],
            f"returns {found}, not {results} results",
            f"return a tuple of {results}: p and each state, in order",
        )
    callable_names = {*functions, *(helper.__name__ for helper in helpers(function))}
    assigned = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    known = {*parameters(function), *assigned, *callable_names}
    for statement in body:
        for part in ast.walk(statement):
            if isinstance(part, ast.Constant) and not of_coefficients:
                refuse(part, f"holds the literal {part.value!r}", "make it a coefficient (Numba would compute in float64)")
            elif isinstance(part, ast.Call) and ast.unparse(part.func) not in callable_names:
                allowed = ", ".join(functions)
                refuse(part, f"calls `{ast.unparse(part.func)}`", f"call {allowed}, or a helper function of the same module")
            elif isinstance(part, ast.Name) and part.id not in known:
                refuse(part, f"reads `{part.id}`, which it is not given", "take it as an argument")
            _check_expression(part, refuse)
    for helper in helpers(function):
        check(helper, of_coefficients=of_coefficients)


def check_coefficients(function: Callable[..., Any], names: Sequence[str], of: str) -> None:
    """Raise :class:`RuleError` unless ``function`` returns a tuple of as many values as there are ``names``."""
    last = tree(function).body[-1]
    value = last.value if isinstance(last, ast.Return) else None
    found = len(value.elts) if isinstance(value, ast.Tuple) else None
    if found != len(names):
        raise RuleError(
            f"{inspect.getsourcefile(function)}:{last.lineno}: the rule {of!r} takes the coefficients "
            f"{', '.join(names) or 'none'}, but {function.__name__!r} returns {'no tuple' if found is None else found}: return "
            "one value for each, in order, as a tuple written out, or declare in `states=` what is a state"
        )
    check(function, of_coefficients=True)


def _check_expression(part: ast.AST, refuse: Callable[[ast.AST, str, str], None]) -> None:
    if isinstance(part, ast.BinOp) and not isinstance(part.op, _OPERATORS):
        refuse(part, f"uses an operator in `{ast.unparse(part)}`", "use + - * / & |, and write powers as products")
    elif isinstance(part, ast.Compare) and not all(isinstance(op, _COMPARISONS) for op in part.ops):
        refuse(part, f"compares by `{ast.unparse(part)}`", "use < <= > >= == !=")
    elif isinstance(part, ast.UnaryOp) and not isinstance(part.op, ast.USub):
        refuse(part, f"uses an operator in `{ast.unparse(part)}`", "turn the comparison around, or use where(condition, a, b)")
    elif isinstance(part, ast.BoolOp | ast.IfExp):
        refuse(part, f"decides on data in `{ast.unparse(part)}`", "use where(condition, a, b), & and |")
    elif isinstance(part, ast.Attribute | ast.Subscript | ast.Lambda | ast.Starred):
        refuse(part, f"uses `{ast.unparse(part)}`", "use names, + - * /, comparisons and the functions that rules may call")


class _Negations(ast.NodeTransformer):
    """Rewrites ``-x`` into ``negative(x)``, for where a plain one is 0 - x, which loses the sign of zero."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """Respell a sign."""
        self.generic_visit(node)
        return ast.Call(ast.Name("negative", ast.Load()), [node.operand], []) if isinstance(node.op, ast.USub) else node


class Divisions(_Negations):
    """Also rewrites ``a / b`` into ``divide(a, b)``, for where a plain division is not correctly rounded."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Respell a division."""
        self.generic_visit(node)
        if isinstance(node.op, ast.Div):
            return ast.Call(ast.Name("divide", ast.Load()), [node.left, node.right], [])
        return node


class Literals(_Negations):
    """Also rewrites a literal number ``x`` into ``number(x)``, for where a plain one is rounded to float32."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Respell a number."""
        return ast.Call(ast.Name("number", ast.Load()), [node], [])


def texts(function: Callable[..., Any], decorator: str, rewrite: ast.NodeTransformer | None = None) -> list[str]:
    """Return the sources of the helpers of ``function`` and its own, each under ``decorator``, for a generated file.

    Args:
        rewrite: what respells the functions for a compiler, :class:`Divisions` or :class:`Literals` (default: None).
    """
    parts = []
    for each in (*helpers(function), function):
        node = ast.parse(ast.unparse(tree(each))).body[0]
        assert isinstance(node, ast.FunctionDef)
        node.decorator_list, node.returns = [], None
        for argument in node.args.args:
            argument.annotation = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if rewrite is not None:
            node = rewrite.visit(node)
        parts.append(f"{decorator}\n{ast.unparse(ast.fix_missing_locations(node))}")
    return parts


def fingerprint(modules: Sequence[types.ModuleType]) -> str:
    """Return a digest of the sources of ``modules``, for generated files whose meaning depends on them."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]


def _default_directory() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusedopt"


@functools.cache
def _usable_directory(wanted: str | None) -> Path:
    try:
        directory = Path(wanted).expanduser() if wanted else _default_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        # Private, because code is imported from it; and for this process only.
        directory = Path(tempfile.mkdtemp(prefix="fusedopt-"))
        atexit.register(_remove, directory, os.getpid())
        return directory


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a forked child, whose parent goes on
        shutil.rmtree(directory, ignore_errors=True)


def cache_directory() -> Path:
    """Return the folder of generated and compiled kernels: ``FUSEDOPT_CACHE_DIR``, else one of the user's caches.

    Where that cannot be written, a private temporary folder serves this process.
    """
    return _usable_directory(os.environ.get("FUSEDOPT_CACHE_DIR"))


# Several threads may take their first steps at once. Numba's compiler has a lock of its own, a half imported module has none.
_loading = threading.RLock()


def _forget_lock() -> None:
    global _loading
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):
    # The thread that holds the lock may not exist in a forked child.
    os.register_at_fork(after_in_child=_forget_lock)


def load(name: str, content: str) -> types.ModuleType:
    """Import ``content`` as a module from a file of the cache folder, named by ``name`` and the content's digest.

    Many processes may do so at once: a file appears whole or not at all, and is never rewritten with other content.
    """
    with _loading:
        return _load(name, content)


def _load(name: str, content: str) -> types.ModuleType:
    stem = f"{name}_{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    module_name = f"fusedopt_generated_{stem}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    path = cache_directory() / f"{stem}.py"
    if not path.exists() or path.read_bytes() != content.encode():
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=stem, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode())
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        try:
            spec.loader.exec_module(module)
        except Exception:
            # What was compiled earlier may be damaged, after a crash or on a full disk: once more without it.
            for compiled in (path.parent / "__pycache__").glob(f"{stem}.*"):
                compiled.unlink(missing_ok=True)
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
