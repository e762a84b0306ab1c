"""Compiles what every request runs through: the same Python, a third less CPU time.

``python deploy/compile.py DIRECTORY`` copies the package there and has Cython compile some
of its modules; the rest stays as it is. No source says anything about that: what Cython has
to know of a class, which attributes it has and of which types, is read from the code and its
annotations. The copy runs wherever DIRECTORY comes first on Python's path, and everything
in it is tested as the original is (``make testcompiled``).
"""

import argparse
import ast
import compileall
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).parent.parent
LOOKUPS = Path(__file__).with_name("lookups.h").resolve()

# Modules, and those of their classes whose objects become C structs. Such a class has no
# bases but others of this list, or is one of msgspec's that is only made and looked at:
# then nothing compares it, copies it or makes JSON of it.
MODULES: dict[str, tuple[str, ...]] = {
    "proxy.admission": ("Admission", "Permit"),
    "proxy.completion": (),
    "proxy.connections": (),
    "proxy.dialects.adjust": ("ReplyFixer",),
    "proxy.dialects.base": ("Reader",),
    "proxy.dialects.cody": ("Completions",),
    "proxy.dialects.openai": ("OpenAIReader",),
    "proxy.dialects.openai_incoming": (
        "ChatWriter",
        "CompletionWriter",
        "_OpenAIWriter",
    ),
    "proxy.dialects.runs": ("Runs",),
    "proxy.exchange": ("Exchange",),
    "proxy.heads": ("Again",),
    "proxy.knobs": ("Knobs",),
    "proxy.limits": ("Gauge", "InFlight", "Plan"),
    "proxy.log": ("ExchangeLog",),
    "proxy.metrics": ("_Sums", "Metrics"),
    "proxy.outcome": (),
    "proxy.outbox": ("Outbox",),
    "proxy.passthrough": ("PassThrough", "PassedBody"),
    "proxy.pool": ("Member", "Pool"),
    "proxy.providers.base": ("Call", "Native"),
    "proxy.providers.openai": ("OpenAICompatibleProvider",),
    "proxy.relay": ("Relay", "Terms"),
    "proxy.response": ("Response",),
    "proxy.server.handling": ("Asking", "Attempt", "Begun", "Handling"),
    "proxy.server.proxy": ("Proxy",),
    "proxy.server.service": ("Course", "Service"),
    "proxy.server.target": ("Known", "Target"),
    "proxy.server.visit": ("Visit",),
    "proxy.sse": ("Parser",),
    "proxy.stops": ("Cutter",),
    "proxy.translation": ("Translation",),
    "proxy.upstream.client": (
        *("Prepared", "Upstream", "UpstreamCall", "UpstreamReply", "_Target"),
    ),
    "proxy.upstream.connection": ("Connection",),
}
# Where functions of Cython's own are that others call, instead of in each: 0.35 MB less
# code, of which an idle process has 0.25 in its memory. No instruction is saved.
SHARED = "proxy._shared"
STRUCTS = {name: module for module, names in MODULES.items() for name in names}

DIRECTIVES = {
    "language_level": "3",
    # Types are told by what is found here, not by whatever Cython makes of annotations.
    "annotation_typing": "False",
    # An attribute of None is an error, as in Python, not a crash.
    "nonecheck": "True",
    # Nothing pickles or copies what is a C struct, 4 % of relay's code. To try is an error.
    "auto_pickle": "False",
}
# They come after Python's own -O3 -g or, with setuptools of today, instead of them: then
# assertions, in Python's headers, were in, and what overflows did not wrap.
CFLAGS = (
    "-DNDEBUG",
    "-fwrapv",
    "-O2",
    "-g0",
    "-w",
    # Whatever only an error comes to is made small: a ninth less code, and 1 to 3 % fewer
    # misses of the first cache. As many instructions, and as much memory when idle.
    "--param builtin-expect-probability=100",
    # Nothing unwinds but debuggers, 0.4 MB of tables. (Threads that end do without, too.)
    "-fno-asynchronous-unwind-tables",
)
# What Cython writes where the code reads an attribute or calls a method, always of the same
# name at the same place, and what takes its place.
_NAME = r"__pyx_mstate_global->__pyx_n_u_\w+"
_LOOKUPS = {
    re.compile(rf"= __Pyx_PyObject_GetAttrStr\((?=.+, {_NAME}\);)"): "= SEEN_GET(",
    re.compile(
        rf"= __Pyx_PyObject_FastCallMethod\((?=\(PyObject\*\){_NAME}, )"
    ): "= SEEN_CALL(",
}
# What Cython compiles in another way inside: a function of those stays one of Python's.
_NOT_FAST = (
    ast.AsyncFunctionDef,
    ast.FunctionDef,
    ast.GeneratorExp,
    ast.Lambda,
    ast.Yield,
    ast.YieldFrom,
)
# Bases that are left out, since nobody asks for them: a class has all methods of its own.
_LEFT_OUT = {"asyncio.Protocol", "msgspec.Struct"}
# Decorators of methods that do the same there.
_DECORATORS = {
    "contextlib.asynccontextmanager",
    "contextlib.contextmanager",
    "property",
    "staticmethod",
}


class Unfit(Exception):
    """A class cannot be what the list says that it is."""


class Struct:
    """What Cython has to be told of a class, and how its source has to be changed.

    Class attributes become what ``__cinit__`` sets, before any ``__init__``: a C struct
    has no defaults. What is no mere constant is still made once, before the class, for all
    its objects.
    """

    def __init__(self, node: ast.ClassDef) -> None:
        self.node = node
        self.bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        self.base = next((base for base in self.bases if base in STRUCTS), "")
        self.is_record = any(
            ast.unparse(each) == "msgspec.Struct" for each in node.bases
        )
        self.attributes: dict[str, str] = {}  # with the names of their types
        self.methods: list[ast.FunctionDef] = []
        self.defaults: list[str] = []
        self.shared: list[str] = []  # lines before the class
        self.gone: list[ast.stmt] = []  # statements of the class's own
        self.init: ast.FunctionDef | None = None
        properties = set()
        for item in node.body:
            if isinstance(item, ast.Assign | ast.AnnAssign):
                self._read_default(item)
            elif isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                if item.decorator_list:
                    self._check_decorators(item)
                    properties.add(item.name)
                elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    self.init = item
                elif isinstance(item, ast.FunctionDef) and _is_fast(item):
                    self.methods.append(item)
                self._read_stores(item)
            elif not isinstance(item, ast.Expr | ast.Pass):  # a docstring
                raise Unfit(f"{node.name}, line {item.lineno}: what is this?")
        for name in properties:
            self.attributes.pop(name, None)
        self._check()

    def beginning(self) -> str:
        """The ``__cinit__``, on one line."""
        lines = "; ".join(self.defaults)
        return f"    def __cinit__(self): {lines}" if lines else ""

    def constructor(self) -> str:
        """The ``__init__`` that msgspec would have made of the fields of a record."""
        is_kw_only = any(word.arg == "kw_only" for word in self.node.keywords)
        given, body = ["self", *["*"] * is_kw_only], []
        for item in self.gone:
            if not isinstance(item, ast.AnnAssign):
                raise Unfit(f"{self.node.name}, line {item.lineno}: no field")
            name = ast.unparse(item.target)
            default = None if item.value is None else ast.unparse(item.value)
            if default is None:
                given.append(name)
            elif default in ("[]", "{}"):  # each has its own
                given.append(f"{name}=None")
                name = f"{name} = {default} if {name} is None else {name}"
            elif isinstance(item.value, ast.Constant) or default == "()":
                given.append(f"{name}={default}")
            else:
                raise Unfit(f"{self.node.name}, line {item.lineno}: {default}?")
            body.append(f"self.{name if '=' in name else f'{name} = {name}'}")
        return f"    def __init__({', '.join(given)}): {'; '.join(body)}"

    def _check(self) -> None:
        name = self.node.name
        if self.node.decorator_list:
            raise Unfit(f"{name} has decorators")
        if self.is_record and "__post_init__" in _names_in(self.node):
            raise Unfit(f"{name} has a __post_init__")
        for base in map(ast.unparse, self.node.bases):
            if base not in STRUCTS and base not in _LEFT_OUT:
                raise Unfit(f"{name} has the base {base}")

    def _check_decorators(self, item: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        known = _DECORATORS | {f"{item.name}.setter"}
        for decorator in map(ast.unparse, item.decorator_list):
            if decorator not in known:
                raise Unfit(f"{self.node.name}.{item.name} has @{decorator}")

    def _read_default(self, item: ast.Assign | ast.AnnAssign) -> None:
        targets = [item.target] if isinstance(item, ast.AnnAssign) else item.targets
        target = targets[0]
        if len(targets) > 1 or not isinstance(target, ast.Name):
            raise Unfit(f"{self.node.name}, line {item.lineno}: what is this?")
        self.gone.append(item)
        if target.id == "__slots__":
            return
        annotation = item.annotation if isinstance(item, ast.AnnAssign) else None
        self.attributes[target.id] = type_of(annotation)
        if item.value is not None and not self.is_record:
            value = self._default(target.id, item.value)
            self.defaults.append(f"self.{target.id} = {value}")

    def _default(self, name: str, value: ast.expr) -> str:
        used = {each.id for each in ast.walk(value) if isinstance(each, ast.Name)}
        if own := used & _names_in(self.node):
            raise Unfit(f"{self.node.name}.{name} refers to {', '.join(sorted(own))}")
        if isinstance(value, ast.Constant):
            return ast.unparse(value)
        shared = f"_{self.node.name}_{name}"
        self.shared.append(f"{shared} = {ast.unparse(value)}")
        return shared

    def _read_stores(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        types = {each.arg: type_of(each.annotation) for each in _arguments(function)}
        annotated = {}
        for node in ast.walk(function):
            if isinstance(node, ast.AnnAssign):
                annotated[ast.unparse(node.target)] = type_of(node.annotation)
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or not isinstance(
                node.ctx, ast.Store
            ):
                continue
            if not isinstance(node.value, ast.Name) or node.value.id != "self":
                continue
            kind = annotated.get(f"self.{node.attr}", "")
            if node.attr not in self.attributes:
                known = types if function is self.init else {}
                for given in _given(function, node.attr):
                    kind = kind or _kind_of(given, known)
            self.attributes.setdefault(node.attr, kind)

    def declaration(self, inherited: set[str]) -> Iterator[str]:
        base = f"({self.base})" if self.base else ""
        yield f"cdef class {self.node.name}{base}:"
        if not self.base:
            yield "    cdef object __weakref__"
        for name, kind in self.attributes.items():
            if name not in inherited:
                yield f"    cdef public {cname(kind)} {name}"
        for method in self.methods:
            for line in told_of(method, is_method=True):
                yield f"    {line}"


def _names_in(node: ast.ClassDef) -> set[str]:
    """What a class itself defines."""
    names = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(item.name)
        elif isinstance(item, ast.Assign | ast.AnnAssign):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            names.update(each.id for each in targets if isinstance(each, ast.Name))
    return names


def type_of(annotation: ast.expr | None) -> str:
    """Return which of the structs it is, "" for anything else of Python's."""
    if annotation is None:
        return ""
    if isinstance(annotation, ast.BinOp):  # X | None
        sides = [annotation.left, annotation.right]
        others = [each for each in sides if ast.unparse(each) != "None"]
        return type_of(others[0]) if len(others) == 1 else ""
    text = ast.unparse(annotation).strip("'")
    text = text.removesuffix(" | None")
    return text if text in STRUCTS else ""


def cname(kind: str) -> str:
    return f"{kind}_t" if kind else "object"


def told_of(function: ast.FunctionDef, *, is_method: bool) -> Iterator[str]:
    """The signature of a function, and before it the types of its variables."""
    arguments = function.args
    positional = arguments.args[is_method:]
    optional = len(arguments.defaults)
    given = [
        (each, number >= len(positional) - optional)
        for number, each in enumerate(positional)
    ]
    # In C they are told by their places alone, those that must be named as well.
    given += [
        (each, default is not None)
        for each, default in zip(
            arguments.kwonlyargs, arguments.kw_defaults, strict=True
        )
    ]
    if names := [
        f"{name}={cname(kind)}" for name, kind in _variables(function).items()
    ]:
        yield f"@cython.locals({', '.join(names)})"
    shown = ["self"] if is_method else []
    for each, is_optional in given:
        kind = cname(type_of(each.annotation))
        shown.append(f"{kind} {each.arg}{'=*' * is_optional}")
    kind = cname(type_of(function.returns))
    yield f"cpdef {kind} {function.name}({', '.join(shown)})"


def _variables(function: ast.FunctionDef) -> dict[str, str]:
    """The variables whose annotations say that they are structs."""
    found: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = type_of(node.annotation)
            found |= {node.target.id: kind} if kind else {}
    return found


def _is_fast(function: ast.FunctionDef) -> bool:
    """Whether others can call it without going by Python's protocol."""
    arguments = function.args
    # Of such a function Cython cannot tell ``super()`` what it is in.
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return (
        "super" not in names
        and not function.name.startswith("__")
        and not _is_unordered(arguments)
        and not (arguments.posonlyargs or arguments.vararg or arguments.kwarg)
        and not any(
            isinstance(node, _NOT_FAST)
            for statement in function.body
            for node in ast.walk(statement)
        )
    )


def _inner_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions that nobody but the module itself calls."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("_")
        and not node.decorator_list
        and _is_fast(node)
    ]


def _is_unordered(arguments: ast.arguments) -> bool:
    """Whether an argument that must be given would follow one that need not be."""
    has_defaults = [False] * (len(arguments.args) - len(arguments.defaults))
    has_defaults += [True] * len(arguments.defaults)
    has_defaults += [default is not None for default in arguments.kw_defaults]
    return has_defaults != sorted(has_defaults)


def _drop_stars(function: ast.FunctionDef, lines: list[str]) -> None:
    """Let what must be named be told by its place, too: a function of C knows no other
    way. Who calls it has been checked to name it.
    """
    arguments = function.args
    if not arguments.kwonlyargs:
        return
    first = arguments.kwonlyargs[0]
    number, column = first.lineno - 1, first.col_offset
    while "*" not in (before := lines[number][:column]):
        number, column = number - 1, len(lines[number - 1])
    star = before.rindex("*")
    rest = lines[number][star + 1 :].lstrip().removeprefix(",").lstrip()
    lines[number] = before[:star] + rest


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def _given(
    function: ast.FunctionDef | ast.AsyncFunctionDef, attribute: str
) -> Iterator[ast.expr]:
    """What an attribute is set to."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if ast.unparse(target) == f"self.{attribute}":
                    yield node.value


def _kind_of(value: ast.expr, types: dict[str, str]) -> str:
    """Of an argument, or of an object that is made just there."""
    if isinstance(value, ast.Name):
        return types.get(value.id, "")
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id if value.func.id in STRUCTS else ""
    return ""


def prepare(path: Path, names: tuple[str, ...]) -> None:
    """Change a module's source so that Cython makes of it what the list says, and tell
    it the rest beside that.
    """
    source = path.read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    structs = {
        node.name: Struct(node)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in names
    }
    if missing := set(names) - set(structs):
        raise Unfit(f"{path} has no {', '.join(missing)}")
    told = []
    functions = _inner_functions(tree)
    for function in functions:
        told += [*told_of(function, is_method=False), ""]
    for struct in structs.values():
        _check_uses(tree, struct)
        told += [*struct.declaration(_inherited(struct)), ""]
        functions += struct.methods
    for function in functions:
        _drop_stars(function, lines)
    said = "\n".join(told)
    for struct in reversed(structs.values()):
        decorator = _type_arguments(struct, lines)
        _change(struct, lines)
        if decorator:
            _import_cython(tree, lines)
        said += decorator
    path.write_text("\n".join(lines) + "\n")
    words = set(re.findall(r"\w+", said))
    used = sorted(name for name in STRUCTS if cname(name) in words)
    _check_names(tree, path, set(used) - set(names))
    imports = ["cimport cython"] if "@cython." in said else []
    imports += [f"from {STRUCTS[name]} cimport {name} as {name}_t" for name in used]
    bases = {struct.base for struct in structs.values()} - {"", *names}
    imports += [f"from {STRUCTS[name]} cimport {name}" for name in sorted(bases)]
    path.with_suffix(".pxd").write_text("\n".join([*imports, "", *told]))


def _type_arguments(struct: Struct, lines: list[str]) -> str:
    """Say in the blank line before an ``__init__`` which of its arguments are structs:
    it has no signature of its own that could.
    """
    if struct.init is None or lines[struct.init.lineno - 2]:
        return ""
    types = {each.arg: type_of(each.annotation) for each in _arguments(struct.init)}
    told = ", ".join(f"{name}={cname(kind)}" for name, kind in types.items() if kind)
    if told:
        lines[struct.init.lineno - 2] = f"    @cython.locals({told})"
    return lines[struct.init.lineno - 2]


def _import_cython(tree: ast.Module, lines: list[str]) -> None:
    """Before what else is imported; when it runs nothing is imported by that."""
    said = "import cython"
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            line = lines[node.lineno - 1].removeprefix(f"{said}; ")
            lines[node.lineno - 1] = f"{said}; {line}"
            return
    first = tree.body[ast.get_docstring(tree) is not None].lineno - 1
    if lines[first - 1] not in ("", said):
        raise Unfit("there is no line where it could be said")
    lines[first - 1] = said


def _change(struct: Struct, lines: list[str]) -> None:
    """Change the source of one class. Each line keeps its number, for tracebacks."""
    node = struct.node
    for item in struct.gone:
        end = item.end_lineno or item.lineno
        lines[item.lineno - 1 : end] = [""] * (end - item.lineno + 1)
    if node.bases:
        base = f"({struct.base})" if struct.base else ""
        lines[node.lineno - 1] = f"class {node.name}{base}:"
    added = struct.constructor() if struct.is_record else struct.beginning()
    after = node.end_lineno or node.lineno
    if added:
        lines[after : after + (lines[after : after + 1] == [""])] = [added]
    if struct.shared:
        before = node.lineno - 1
        while before and lines[before - 1]:  # comments
            before -= 1
        lines[max(before - 1, 0) : before] = ["; ".join(struct.shared)]


def _check_uses(tree: ast.Module, struct: Struct) -> None:
    """Of a class itself an attribute is no value any more, but a descriptor."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value) == struct.node.name
            and node.attr in struct.attributes
        ):
            raise Unfit(f"line {node.lineno}: {ast.unparse(node)} is of no object")


def _check_names(tree: ast.Module, path: Path, used: set[str]) -> None:
    """What a module calls by the name of another's struct must be that one."""
    for node in ast.walk(tree):
        others = []
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                name = each.asname or each.name
                home = f"{STRUCTS.get(name)}."
                if name != each.name or not home.startswith(f"{node.module}."):
                    others.append(name)
        elif isinstance(node, ast.ClassDef):
            others.append(node.name)
        for name in used.intersection(others):
            raise Unfit(f"{path}: {name} is another one than that of {STRUCTS[name]}")


def _inherited(struct: Struct) -> set[str]:
    if not struct.base:
        return set()
    path = ROOT / (STRUCTS[struct.base].replace(".", "/") + ".py")
    source = path.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == struct.base:
            return set(Struct(node).attributes)
    raise Unfit(f"{path} has no {struct.base}")


def missing() -> list[str]:
    """Return what has to be installed before anything can be compiled, and how."""
    found = []
    if importlib.util.find_spec("Cython") is None:
        found.append("Cython: pip install '.[compile]'")
    if importlib.util.find_spec("setuptools") is None:
        found.append("setuptools: pip install '.[compile]'")
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    if shutil.which(compiler.split()[0]) is None:
        found.append(
            f"a C compiler ({compiler.split()[0]}): apt-get install gcc, or what your"
            " system calls it"
        )
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        found.append(
            f"Python's headers ({include}/Python.h): apt-get install python3-dev, or"
            " what your system calls it"
        )
    return found


def build(modules: Iterable[str], shared: str = "") -> None:
    """Have modules compiled where they are, below the current directory.

    Args: shared: the module that is made of what all of them need.
    Raises: Unfit: what a compiler says about one of them.
    """
    paths = [module.replace(".", "/") + ".py" for module in modules]
    if shared:
        paths.insert(0, shared.replace(".", "/") + ".c")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = {pool.submit(_compile, path, shared): path for path in paths}
        for number, done in enumerate(as_completed(compiling), 1):
            if said := done.result():
                pool.shutdown(cancel_futures=True)
                raise Unfit(f"{compiling[done]} cannot be compiled:\n{said}")
            print(f"[{number}/{len(paths)}] {compiling[done]}", flush=True)
    shutil.rmtree("build")
    for told in Path().rglob("*.pxd"):
        told.unlink()


def _compile(path: str, shared: str) -> str:
    """Return what is wrong, "" if nothing is."""
    made = Path(path).with_suffix(".c")
    if path == str(made):
        translate = ["--module-name", shared, f"--generate-shared={made}"]
    else:
        options = [f"-X{name}={value}" for name, value in DIRECTIVES.items()]
        translate = [*options, *([f"--shared={shared}"] if shared else []), path]
    steps = (
        ("cython", *translate),
        ("Cython.Build.Cythonize", "--inplace", "-j", "1", str(made)),
    )
    flags = " ".join(
        (os.environ.get("CFLAGS", ""), *CFLAGS, "-include", quote(str(LOOKUPS)))
    )
    said = ""
    for step in steps:
        done = subprocess.run(
            [sys.executable, "-m", *step],
            env=os.environ | {"CFLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            said = done.stdout
            break
        if step[0] == "cython" and path != str(made):
            _remember(made)
    made.unlink(missing_ok=True)
    return said


def _remember(made: Path) -> None:
    """Have a module's C look where a thing was the last time (``lookups.h``)."""
    text = made.read_text()
    for written, instead in _LOOKUPS.items():
        text = written.sub(instead, text)
    made.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="is made anew")
    directory = parser.parse_args().directory
    if needed := missing():
        sys.exit("\n  - ".join(["To compile the proxy, these are missing:", *needed]))
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _copy_to(directory)
    os.chdir(directory)
    for package in Path("proxy").rglob("__init__.py"):
        package.with_suffix(".pxd").touch()
    try:
        for module, names in MODULES.items():
            prepare(Path(module.replace(".", "/") + ".py"), names)
        build(MODULES, SHARED)
    except Unfit as problem:
        sys.exit(f"deploy/compile.py: {problem}")
    # Tracebacks quote the sources, and another Python, for which nothing was compiled,
    # runs them.
    _copy_to(Path())
    # The rest as Python would have it: where it may not write that down itself, each start
    # would take 0.15 s longer, and 1 MB more.
    compileall.compile_dir("proxy", quiet=1)


def _copy_to(directory: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    package = directory / "proxy"
    shutil.copytree(ROOT / "proxy", package, ignore=ignored, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
