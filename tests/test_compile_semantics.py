"""What the compiler's tool must not change, or has to refuse."""

import ast
import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compile_tool", ROOT / "deploy" / "compile.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _tool()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the tool change a module with the struct ``A``; return what became of it."""

    def prepare(source: str, *names: str) -> str:
        names = names or ("A",)
        monkeypatch.setattr(tool, "ROOT", tmp_path)
        for name in names:
            monkeypatch.setitem(tool.STRUCTS, name, "made_up")
        path = tmp_path / "made_up.py"
        path.write_text(dedent(source))
        tool.prepare(path, names)
        return path.read_text()

    return prepare


def a_class(body: str, init: str = "pass") -> str:
    method = f"def __init__(self):\n{indent(init, '    ')}\n"
    return (
        f"class A:\n{indent(dedent(body).strip(), '    ')}\n\n{indent(method, '    ')}"
    )


def made(source: str, name: str = "A") -> Any:
    """Return a function that makes objects as Cython does, of what is still Python."""
    names: dict[str, Any] = {}
    exec(source, names)
    kind = names[name]

    def make() -> Any:
        one = kind.__new__(kind)
        for each in reversed(kind.__mro__):
            if begin := vars(each).get("__cinit__"):
                begin(one)
        one.__init__()
        return one

    return make


@pytest.mark.parametrize(
    "value",
    [
        '(\n    b"one"\n    b"two"\n)',
        "(\n    1\n    + 2\n)",
        '"""two\nlines"""',
        '(\n    "a"  # a comment\n    "b"\n)',
        "-1.5",
        "(1, 2)",
        "[1, 2][0]",
    ],
)
def test_a_default_keeps_its_value_however_it_is_written(prepared: Any, value: str):
    source = a_class(f"x = {value}")
    assert made(prepared(source))().x == made(source)().x


def test_a_default_is_made_once_for_all_objects(prepared: Any):
    source = a_class("shared: dict[str, int] = {}\nplain = 1")
    make = made(prepared(source))
    first, second = make(), make()
    assert first.shared is second.shared
    first.plain = 2
    assert (first.plain, second.plain) == (2, 1)


def test_a_default_of_a_class_with_a_base(prepared: Any):
    source = """
        class A:
            x = [1]

            def __init__(self) -> None:
                self.y = 1


        class B(A):
            z = [2]

            def __init__(self) -> None:
                super().__init__()
        """
    one = made(prepared(source, "A", "B"), "B")()
    assert (one.x, one.y, one.z) == ([1], 1, [2])


def test_lines_keep_their_numbers_for_tracebacks(prepared: Any):
    source = """\
        import x

        SIZE = 5


        # A comment.
        class A(B):
            y = 1

            def f(self):
                return "f"


        class C(msgspec.Struct, frozen=True):
            z: int


        class B:
            w = SIZE
            a: dict[str, int] = {}

            def __init__(self):
                self.v = "v"


        def g():
            return "g"
        """
    before = dedent(source).splitlines()
    after = prepared(source, "A", "B", "C").splitlines()
    assert len(after) == len(before)
    for number, line in enumerate(before):
        if "return" in line or line.endswith(("def f(self):", '= "v"')):
            assert after[number] == line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = y = 0", "what is this"),
        ("x, y = 0, 1", "what is this"),
        ("x = 1\ny = x + 1", "A.y refers to x"),
        ("def f(self):\n    pass\ng = f", "A.g refers to f"),
        ("if True:\n    x = 1", "what is this"),
        ("class Inner:\n    pass", "what is this"),
        (
            "@functools.cached_property\ndef f(self):\n    return 1",
            "A.f has @functools",
        ),
        ("@classmethod\ndef f(cls):\n    return 1", "A.f has @classmethod"),
        ("MOST = 1\ndef f(self):\n    return A.MOST", "A.MOST is of no object"),
    ],
)
def test_what_a_struct_cannot_say_is_refused(prepared: Any, body: str, words: str):
    with pytest.raises(tool.Unfit, match=words):
        prepared(a_class(body))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("class A(Whatever):", "A has the base Whatever"),
        ("class A(Generic[T]):", "A has the base Generic"),
        ("@final\nclass A:", "A has decorators"),
        (
            "class A(msgspec.Struct):\n    def __post_init__(self):\n        pass\n",
            "post",
        ),
    ],
)
def test_a_class_that_is_more_than_it_says_is_refused(
    prepared: Any, head: str, words: str
):
    with pytest.raises(tool.Unfit, match=words):
        prepared(f"{head}\n    def __init__(self):\n        pass\n")


def test_a_default_of_a_base_can_be_another_one(prepared: Any):
    source = """
        class A:
            x = 1

            def __init__(self) -> None:
                pass


        class B(A):
            x = 2
        """
    assert made(prepared(source, "A", "B"), "B")().x == 2


@pytest.mark.parametrize(
    "other",
    [
        "from somewhere.else_ import Relay",
        "from proxy.relay import Other as Relay",
        "class Relay:\n    pass",
    ],
)
def test_a_namesake_of_a_struct_is_refused(prepared: Any, other: str):
    with pytest.raises(tool.Unfit, match="Relay is another one than that of"):
        prepared(f"{other}\n\n\n{a_class('x: Relay | None = None')}")


def test_the_type_of_an_attribute_is_that_of_its_own_object(
    prepared: Any, tmp_path: Path
):
    prepared("""
        class A:
            def __init__(self, a: "A", other: object) -> None:
                self.mine = None
                other.mine = a
        """)
    assert "cdef public object mine" in (tmp_path / "made_up.pxd").read_text()


@pytest.mark.parametrize(
    "method",
    [
        "def f(self, a, /):\n    return a",  # arguments without names
        "def f(self):\n    return super().f()",
    ],
)
def test_what_cython_cannot_call_by_itself_stays_python(
    prepared: Any, tmp_path: Path, method: str
):
    prepared(a_class(method))
    assert "cpdef" not in (tmp_path / "made_up.pxd").read_text()


# -------------------------------------------------------------------- of the real ones


def _modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "proxy").rglob("*.py")):
        yield path, ast.parse(path.read_text())


def _attributes() -> dict[str, set[str]]:
    """Of each struct, by its name."""
    found = {}
    for path, tree in _modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and tool.STRUCTS.get(node.name) == module:
                found[node.name] = set(tool.Struct(node).attributes)
    return found


def test_subclasses_in_python_have_no_defaults_of_their_own_for_a_struct():
    """A struct's own code would not see them."""
    attributes, wrong = _attributes(), []
    inherited = {name: set(own) for name, own in attributes.items()}
    for _ in range(3):  # classes of classes
        for path, tree in _modules():
            for node in ast.walk(tree):
                if not isinstance(node, ast.ClassDef) or node.name in attributes:
                    continue
                for base in map(ast.unparse, node.bases):
                    names = inherited.get(base, set())
                    inherited.setdefault(node.name, set()).update(names)
                    own = {
                        each.id
                        for item in node.body
                        if isinstance(item, ast.Assign | ast.AnnAssign)
                        for each in ast.walk(item)
                        if isinstance(each, ast.Name)
                        and isinstance(each.ctx, ast.Store)
                    }
                    wrong += [f"{path}: {node.name}.{name}" for name in own & names]
    assert "is_logged" in inherited["PageRequest"]  # else nothing was looked at
    assert not wrong


def test_a_base_that_is_left_out_is_not_missed():
    wanted = {name for name in dir(asyncio.Protocol) if not name.startswith("_")}
    missed = {
        node.name: wanted - {getattr(item, "name", "") for item in node.body}
        for _, tree in _modules()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and node.name in tool.STRUCTS
        and "asyncio.Protocol" in map(ast.unparse, node.bases)
    }
    assert missed == {"Connection": set()}


def test_nobody_asks_a_class_for_what_its_objects_have():
    attributes, wrong = _attributes(), []
    for path, tree in _modules():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.attr in attributes.get(node.value.id, ())
            ):
                wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


# Of a response it is that of its upstream, which lives as long as the proxy; a parser that
# ends calls nobody.
_KEPT = {("Response", "outbox"), ("Translation", "_parser")}


def test_nothing_is_let_go_of_while_a_method_of_it_runs():
    """Of a struct in a struct's attribute Cython calls methods without a reference of its
    own: were the attribute set meanwhile, the method would go on with freed memory. So
    what may be set again is called by way of a variable.
    """
    typed, calls, stores, elsewhere = {}, set(), set(), set()
    for path, tree in _modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for kind in tree.body:
            is_struct = (
                isinstance(kind, ast.ClassDef) and tool.STRUCTS.get(kind.name) == module
            )
            name = kind.name if isinstance(kind, ast.ClassDef) else ""
            if is_struct:
                typed[name] = {k for k, v in tool.Struct(kind).attributes.items() if v}
            for function in ast.walk(kind):
                if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and isinstance(
                        node.ctx, ast.Store
                    ):
                        if ast.unparse(node.value) != "self":
                            elsewhere.add(node.attr)
                        elif function.name != "__init__":
                            stores.add((name, node.attr))
                    elif isinstance(node, ast.Call):
                        called = node.func
                        owner = getattr(called, "value", None)
                        if isinstance(owner, ast.Attribute):
                            is_own = ast.unparse(owner.value) == "self"
                            calls.add((name if is_own else "", owner.attr))
    calls |= {(kind, attr) for kind in typed for own, attr in calls if not own}
    risky = {
        (kind, attr)
        for kind, attr in calls
        if attr in typed.get(kind, ()) and ((kind, attr) in stores or attr in elsewhere)
    }
    assert ("Relay", "_response") in calls  # else nothing was looked at
    assert risky == _KEPT
