"""What Cython is told of a class is what its code says, and what comes of it behaves alike."""

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from deploy import compile as tool
from proxy import __version__, relay
from proxy.relay import Relay
from proxy.upstream import Upstream, UpstreamReply
from tests.support.client import build_request, connect
from tests.support.dialects import CHAT
from tests.support.fixtures import RunningProxy, Starter, model_configuration
from tests.support.process import serve, until
from tests.support.upstream import Hang, ScriptedUpstream, reply, sse_head

Told = Callable[..., tuple[str, str]]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Have made-up modules prepared; return the source and what is told of the last."""

    def prepared(**sources: str) -> tuple[str, str]:
        classes = {
            f"made.{name}": tuple(
                line.removeprefix("class ").partition("(")[0].rstrip(":")
                for line in dedent(source).splitlines()
                if line.startswith("class ")
            )
            for name, source in sources.items()
        }
        structs = {each: module for module, names in classes.items() for each in names}
        monkeypatch.setattr(tool, "STRUCTS", structs)
        monkeypatch.setattr(tool, "ROOT", tmp_path)
        package = tmp_path / "made"
        package.mkdir()
        for beginning in (package / "__init__.py", package / "__init__.pxd"):
            beginning.touch()
        for name, source in sources.items():
            (package / f"{name}.py").write_text(dedent(source))
        for module, names in classes.items():
            tool.prepare(tmp_path / (module.replace(".", "/") + ".py"), names)
        path = package / f"{[*sources][-1]}.py"
        return path.read_text(), path.with_suffix(".pxd").read_text()

    return prepared


# ----------------------------------------------------------------------- what is told


def test_attributes_are_those_that_are_set(told: Told):
    _, pxd = told(
        one="""
        class Box:
            __slots__ = ("inner", "size")

            def __init__(self, inner: "Box | None", size: int) -> None:
                self.inner = inner
                self.size = size
                self.first: Box | None = None

            def fill(self) -> None:
                self.late = 1
                self.first.size = 2
        """
    )
    assert pxd.splitlines() == [
        "cimport cython",
        "from made.one cimport Box as Box_t",
        "",
        "cdef class Box:",
        "    cdef object __weakref__",
        "    cdef public Box_t inner",
        "    cdef public object size",
        "    cdef public Box_t first",
        "    cdef public object late",
        "    cpdef object fill(self)",
    ]


def test_arguments_variables_and_what_is_made_have_types(told: Told):
    source, pxd = told(
        one="""
        from made import thing


        class Box:
            '''A box.'''

            def __init__(self, inner: "Box | None", *, size: int) -> None:
                self.inner = inner
                self.made = Box(None, size=1)
                self.size = size

            def first(self, boxes: list["Box"]) -> "Box":
                box: Box
                for box in boxes:
                    return box
                self.late = Box(None, size=2)
                return self.late
        """
    )
    assert "    @cython.locals(inner=Box_t)\n    def __init__(" in source
    assert "import cython; from made import thing\n" in source
    lines = [line.strip() for line in pxd.splitlines()]
    assert lines[0] == "cimport cython"
    for declared in ("Box_t inner", "Box_t made", "object size", "Box_t late"):
        assert f"cdef public {declared}" in lines
    signature = lines.index("cpdef Box_t first(self, object boxes)")
    assert lines[signature - 1] == "@cython.locals(box=Box_t)"


def test_a_modules_own_functions_are_fast(told: Told):
    _, pxd = told(
        one="""
        class Box:
            def __init__(self) -> None:
                self.size = 1


        def _size_of(box: Box, *, default: int = 0) -> int:
            other: Box | None = box
            return other.size


        def size_of(box: Box) -> int:
            return box.size


        @some
        def _odd(box: Box) -> int:
            return box.size


        def _sizes(boxes: list[Box]) -> int:
            return sum(box.size for box in boxes)
        """
    )
    lines = pxd.splitlines()
    signature = lines.index("cpdef object _size_of(Box_t box, object default=*)")
    assert lines[signature - 1] == "@cython.locals(other=Box_t)"
    assert not [
        line for line in lines if "size_of(" in line and " _size_of(" not in line
    ]
    assert not [line for line in lines if "_odd" in line or "_sizes" in line]


def test_what_must_be_named_is_told_by_its_place_as_well(told: Told):
    source, _ = told(
        one="""
        class Box:
            def fill(self, size: int, *, deep: bool) -> None:
                self.size = size

            def empty(
                self,
                *,
                fast: bool = False,
            ) -> None:
                self.size = 0
        """
    )
    lines = [line.strip() for line in source.splitlines()]
    assert "def fill(self, size: int, deep: bool) -> None:" in lines
    begin = lines.index("def empty(")
    assert lines[begin : begin + 5] == [
        "def empty(",
        "self,",
        "",
        "fast: bool = False,",
        ") -> None:",
    ]


def test_class_attributes_are_set_before_init(told: Told):
    source, pxd = told(
        one="""
        class Box:
            '''A box.'''

            limit = 1
            other: "Box | None" = None
            name: str

            def __init__(self, limit: int) -> None:
                self.limit = limit
        """
    )
    assert [line.strip() for line in source.splitlines() if line.strip()] == [
        "class Box:",
        "'''A box.'''",
        "def __init__(self, limit: int) -> None:",
        "self.limit = limit",
        "def __cinit__(self): self.limit = 1; self.other = None",
    ]
    for declared in ("object limit", "Box_t other", "object name"):
        assert f"    cdef public {declared}" in pxd.splitlines()


def test_fields_of_a_record_become_arguments(told: Told):
    source, pxd = told(
        one="""
        import msgspec


        class Box(msgspec.Struct, frozen=True, kw_only=True):
            size: int
            name: str = ""
            inner: "Box | None" = None
            more: list[int] = []
        """
    )
    assert [line.strip() for line in source.splitlines() if line.strip()] == [
        "import msgspec",
        "class Box:",
        "def __init__(self, *, size, name='', inner=None, more=None):"
        " self.size = size; self.name = name; self.inner = inner;"
        " self.more = [] if more is None else more",
    ]
    for declared in ("object size", "object name", "Box_t inner", "object more"):
        assert f"    cdef public {declared}" in pxd.splitlines()


def test_what_is_inherited_is_declared_once(told: Told):
    source, pxd = told(
        one="""
        class Box:
            def __init__(self) -> None:
                self.size = 1
        """,
        two="""
        import asyncio

        from made.one import Box


        class Crate(Box, asyncio.Protocol):
            def __init__(self) -> None:
                self.size = 2
                self.lid = 3
        """,
    )
    assert pxd.splitlines() == [
        "from made.one cimport Box",
        "",
        "cdef class Crate(Box):",
        "    cdef public object lid",
    ]
    assert "class Crate(Box):" in source.splitlines()


def test_a_base_that_is_no_struct_is_left_out(told: Told):
    source, pxd = told(
        one="""
        import asyncio


        class Wire(asyncio.Protocol):
            def __init__(self) -> None:
                self.size = 1
        """
    )
    assert "class Wire:" in source.splitlines()
    assert "cdef class Wire:" in pxd.splitlines()


def test_properties_are_no_attributes(told: Told):
    _, pxd = told(
        one="""
        class Box:
            def __init__(self) -> None:
                self._size = 1
                self.size = 2

            @property
            def size(self) -> int:
                return self._size

            @size.setter
            def size(self, size: int) -> None:
                self._size = size
        """
    )
    assert [line for line in pxd.splitlines() if "size" in line] == [
        "    cdef public object _size"
    ]


@pytest.mark.parametrize(
    ("method", "signature"),
    [
        ("def f(self): ...", "cpdef object f(self)"),
        ("def f(self, a: int, b=1): ...", "cpdef object f(self, object a, object b=*)"),
        ("def f(self, a: 'Box') -> Box: ...", "cpdef Box_t f(self, Box_t a)"),
        ("def f(self, a: None | Box): ...", "cpdef object f(self, Box_t a)"),
        ("def f(self, a: int | Box | None): ...", "cpdef object f(self, object a)"),
        ("def f(self, *, a): ...", "cpdef object f(self, object a)"),
        (
            "def f(self, a=1, *, b=2): ...",
            "cpdef object f(self, object a=*, object b=*)",
        ),
        ("def f(self, a=1, *, b): ...", ""),
        ("def f(self, *a): ...", ""),
        ("def f(self, **a): ...", ""),
        ("async def f(self): ...", ""),
        ("def f(self): yield", ""),
        ("def f(self): return lambda: 1", ""),
        ("def f(self): return sum(x for x in ())", ""),
        ("def __len__(self): return 1", ""),
        ("@property\n    def f(self): ...", ""),
    ],
)
def test_methods_are_fast_where_cython_can_make_them_so(
    told: Told, method: str, signature: str
):
    _, pxd = told(one=f"class Box:\n    {method}\n")
    found = [line.strip() for line in pxd.splitlines() if "cpdef" in line]
    assert found == ([signature] if signature else [])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Box:\n    a, b = 1, 2\n", "Box, line 2: what is this?"),
        ("class Box(msgspec.Struct):\n    a = 1\n", "Box, line 2: no field"),
        ("class Box(msgspec.Struct):\n    a: int = f()\n", "Box, line 2: f()?"),
    ],
)
def test_what_does_not_fit_is_refused(told: Told, source: str, said: str):
    with pytest.raises(tool.Unfit) as refused:
        told(one=source)
    assert str(refused.value) == said


def test_a_class_that_is_not_there_is_refused(told: Told, tmp_path: Path):
    told(one="class Box:\n    pass\n")
    with pytest.raises(tool.Unfit, match=r"made/one\.py has no Crate"):
        tool.prepare(tmp_path / "made/one.py", ("Box", "Crate"))


@pytest.mark.parametrize("module", tool.MODULES)
def test_modules_and_classes_of_the_list_exist_and_fit(module: str, tmp_path: Path):
    source = tool.ROOT / (module.replace(".", "/") + ".py")
    copy = tmp_path / source.name
    copy.write_text(source.read_text())
    tool.prepare(copy, tool.MODULES[module])
    pxd = copy.with_suffix(".pxd").read_text()
    for name in tool.MODULES[module]:
        assert f"cdef class {name}" in pxd


# ----------------------------------------------------------------------- what comes of it


def needs_compilers() -> None:
    if missing := tool.missing():
        if "CI" in os.environ:
            pytest.fail(f"CI has to have {'; '.join(missing)}")
        pytest.skip("; ".join(missing))


BOX = """
import asyncio


class Box(asyncio.Protocol):
    limit = 3
    inner: "Box | None" = None

    def __init__(self, size: int = 1) -> None:
        self.size = size

    @property
    def is_full(self) -> bool:
        return self.size >= self.limit

    def fill(self, more: int = 1) -> "Box":
        self.size += more
        return self

    def depth(self) -> int:
        return 1 + self.inner.depth()

    def inner_size(self) -> int:
        return self.inner.size

    async def later(self) -> int:
        await asyncio.sleep(0)
        return self.size
"""
CRATE = """
import msgspec

from made.box import Box


class Label(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    box: Box | None = None
    more: list[int] = []


class Crate(Box):
    def __init__(self) -> None:
        super().__init__(2)
        self.limit = 4

    def fill(self, more: int = 2) -> Box:
        Box.fill(self, more)
        return self
"""
USE = """
import asyncio, weakref
import made.box, made.crate
from made.box import Box
from made.crate import Crate, Label

def refused(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(call)

assert made.box.__file__.endswith(".so"), made.box.__file__
assert made.crate.__file__.endswith(".so"), made.crate.__file__
box, crate = Box(), Crate()
assert (box.size, box.limit, box.inner, box.is_full) == (1, 3, None, False)
assert box.fill(more=2) is box and box.is_full
box.limit = 5
assert (box.is_full, Box().limit) == (False, 3)
assert isinstance(crate, Box) and (crate.size, crate.limit) == (2, 4)
assert crate.fill().size == 4 and crate.is_full and crate.fill(1).size == 5
assert asyncio.run(crate.later()) == 5
crate.inner = box
assert crate.inner_size() == 3
box.inner = None
for call in (crate.depth, box.depth, box.inner_size):
    refused(AttributeError, call)
refused(TypeError, lambda: setattr(box, "inner", 1))
refused(AttributeError, lambda: setattr(box, "other", 1))
label = Label(text="a", box=box)
assert (label.text, label.box, label.more) == ("a", box, [])
assert Label(text="b").more is not label.more
refused(TypeError, lambda: Label("a"))
refused(TypeError, Label)
refused(TypeError, lambda: Label(text="a", box=1))
gone = weakref.ref(crate)
del crate
assert gone() is None

class Special(Box):
    def fill(self, more=1):
        return "filled"

assert Special().fill() == "filled"
print("good")
"""


@pytest.mark.timeout(300)
def test_what_was_compiled_does_the_same(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    needs_compilers()
    told(box=BOX, crate=CRATE)
    monkeypatch.chdir(tmp_path)
    tool.build(["made.box", "made.crate"], "made.shared")
    said = capsys.readouterr().out.split()
    assert said[::2] == ["[1/3]", "[2/3]", "[3/3]"]
    assert sorted(said[1::2]) == ["made/box.py", "made/crate.py", "made/shared.c"]
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".py", ".so"}
    assert not (tmp_path / "build").exists()
    # In a process of its own: a crash is to be no one else's.
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


# What is read and called there, always at the same place in the code.
LOOKS = """
def read(thing):
    found = thing.x
    return found

def call(thing, given):
    return thing.do(given)

def real(thing):
    found = thing.real
    return found
"""
# Each of these would go wrong if what was remembered were trusted too long.
LOOK = """
import msgspec
from made import looks
from made.looks import call, read, real

assert not looks.__file__.endswith(".py")

class First:
    __slots__ = ("x",)
    def __init__(self, x): self.x = x
    def do(self, given): return ("first", given)

class Second:
    __slots__ = ("y", "x", "do")
    def __init__(self, x): self.y, self.x, self.do = "y", x, lambda given: (x, given)

class Third(First):
    __slots__ = ("y",)

class Record(msgspec.Struct):
    y: int
    x: object

class Loose(First):  # has a dictionary
    pass

class Hidden:
    x = property(lambda self: "hidden")
    do = staticmethod(lambda given: ("static", given))

class Shared:
    x = "shared"
    @classmethod
    def do(cls, given): return (cls.__name__, given)

def refuses(function, *given):
    try:
        return function(*given) is None
    except AttributeError as error:
        return str(error)

def learn(kind):
    for number in range(3):
        assert read(kind(number)) == number
        assert call(kind(number), 2) == ("first", 2)

# What is not there.
learn(First)
empty = First(1)
del empty.x
assert "'First' object has no attribute 'x'" in refuses(read, empty), refuses(read, empty)
assert refuses(read, First.__new__(First))
assert read(First(7)) == 7
assert "'int' object has no attribute 'do'" in refuses(call, 1, 1)
for nothing in (None, 1.5, read):
    assert refuses(call, nothing, 1)
# A dictionary of its own.
learn(Loose)
loose = Loose(1)
loose.do = lambda given: ("own", given)
assert call(loose, 3) == ("own", 3)
# A class, and one of its bases, that change.
learn(First)
slot, First.x = First.x, property(lambda self: "new")
assert read(empty) == "new"
First.x = slot
learn(First)
First.__getattr__ = lambda self, name: "got " + name
assert read(empty) == "got x"
del First.__getattr__
learn(First)
First.__getattribute__ = lambda self, name: "all" if name == "x" else object.__getattribute__(self, name)
assert read(First(1)) == "all"
del First.__getattribute__
learn(Third)
old, First.do = First.do, lambda self, given: ("changed", given)
assert call(Third(1), 4) == ("changed", 4)
First.do = old
learn(Third)
First.x = property(lambda self: "new", lambda self, x: None)
assert read(Third(1)) == "new"
First.x = slot
Third.do = lambda self, given: ("third", given)
assert call(Third(1), 5) == ("third", 5)
del Third.do
learn(Third)
# One that takes another's place.
class Twin:
    __slots__ = ("x",)
    def do(self, given): return ("twin", given)
moved = First(8)
learn(First)
moved.__class__ = Twin
assert (read(moved), call(moved, 6)) == (8, ("twin", 6))
# What is no slot for an object, or one of other objects.
for number in range(3):
    assert real(1.5 + number * 1j) == 1.5
class Stolen:
    __slots__ = ("y",)
    x = First.x
    def __init__(self): self.y = 1
for number in range(3):
    try:
        read(Stolen())
    except TypeError as error:
        assert "doesn't apply to a 'Stolen' object" in str(error)
    else:
        raise AssertionError
# A method that is gone before it has returned.
class Fleeting:
    __slots__ = ()
    def do(self, given):
        if given:
            del Fleeting.do
        return [given]
for given in (0, 0, 0, 1):
    assert call(Fleeting(), given) == [given]
assert refuses(call, Fleeting(), 0)
# Errors of what is called, and of a wrong call.
class Wrong:
    __slots__ = ()
    def do(self): ...
for number in range(3):
    try:
        call(Wrong(), 1)
    except TypeError as error:
        assert "positional argument" in str(error)
    else:
        raise AssertionError
# All kinds, one for long and then the next, and in turn: in the end nothing is looked for.
kinds = {
    First: "a", Second: "b", Third: "c", Loose: "d",
    lambda x: Record(1, x): "e", lambda x: Hidden(): "hidden", lambda x: Shared(): "shared",
}
for kind, value in kinds.items():  # one kind for long, then the next
    for number in range(200):
        assert read(kind(value)) == value
for number in range(100):  # all of them in turn
    for kind, value in kinds.items():
        assert read(kind(value)) == value
marks = {
    First: "first", Second: "b", Third: "first", Loose: "first",
    lambda x: Hidden(): "static", lambda x: Shared(): "Shared",
}
for rounds in (200, 1):
    for repeated in range(1 if rounds > 1 else 100):
        for kind, mark in marks.items():
            for number in range(rounds):
                assert call(kind("b"), number) == (mark, number)
print("good")
"""


@pytest.mark.timeout(300)
def test_what_was_looked_up_is_trusted_only_while_it_holds(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs_compilers()
    told(looks=LOOKS)
    monkeypatch.chdir(tmp_path)
    remember, written = tool._remember, []

    def remember_and_look(made: Path) -> None:
        remember(made)
        written.append(made.read_text())

    monkeypatch.setattr(tool, "_remember", remember_and_look)
    tool.build(["made.looks"])
    (text,) = written
    assert "= SEEN_GET(__pyx_v_thing, " in text
    assert re.search(r"= SEEN_CALL\(.*__pyx_n_u_do, ", text)
    # Cython's own functions, which are given names, are left alone.
    assert re.search(r"= __Pyx_PyObject_GetAttrStr\(obj, (attr_)?name\)", text)
    assert not re.search(r"SEEN_\w+\((?!.*__pyx_n_u_)", text)
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


@pytest.mark.timeout(300)
def test_what_a_compiler_does_not_take_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs_compilers()
    monkeypatch.chdir(tmp_path)
    Path("wrong.py").write_text("def f():\n    return +\n")
    with pytest.raises(tool.Unfit) as refused:
        tool.build(["wrong"])
    assert str(refused.value).startswith("wrong.py cannot be compiled:\n")
    assert "wrong.py:2:" in str(refused.value)
    with pytest.raises(tool.Unfit) as refused:
        tool.build([], "nowhere.shared")  # there is no such directory
    assert str(refused.value).startswith("nowhere/shared.c cannot be compiled:\n")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = tmp_path / "copy"
    monkeypatch.setattr(sys, "argv", ["compile.py", str(there)])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("CC", "acme-cc -m64")
    with pytest.raises(SystemExit) as end:
        tool.main()
    said = str(end.value)
    assert "Cython: pip install '.[compile]'" in said
    assert "a C compiler (acme-cc): apt-get install gcc" in said
    assert not there.exists()


# ------------------------------------------------------------- of whichever runs here


async def test_what_runs_is_said():
    is_compiled = not str(relay.__file__).endswith(".py")
    version = f"{__version__} (compiled)" if is_compiled else __version__
    command = (sys.executable, "-m", "proxy", "--version")
    asked = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert (await asked.communicate())[0].decode() == f"{version}\n"
    async with serve() as running:
        assert running.said.startswith(f"completions-proxy {version}\n")


USES: dict[str, Callable[[UpstreamReply], object]] = {
    "header": lambda gone: gone.header("x"),
    "pairs": lambda gone: gone.pairs,
    "named": lambda gone: gone.named(bool),
    "listen": lambda gone: gone.listen(None),
    "is_going_on": lambda gone: gone.is_going_on(),
    "is_complete": lambda gone: gone.is_complete(),
    "failure": lambda gone: gone.failure,
    "pause": lambda gone: gone.pause(),
    "resume": lambda gone: gone.resume(),
}


async def test_a_reply_without_its_connection_is_an_error(upstream: ScriptedUpstream):
    upstream.script(reply(200, body=b"x"))
    client = Upstream()
    async with client.open(upstream.url, {}, None, "there") as gone:
        connection, gone._connection = gone._connection, None  # type: ignore[assignment]
        for name, use in USES.items():
            with pytest.raises(AttributeError, match="NoneType"):
                pytest.fail(f"{name}: {use(gone)}")
        gone._connection = connection
        assert await gone.read() == b"x"
    await client.close()


async def test_a_relay_that_let_go_of_all_is_an_error(
    upstream: ScriptedUpstream, start: Starter
):
    upstream.script([sse_head(), Hang()])
    proxy = await start(model_configuration(upstream.url))
    body = CHAT.body(stream=True)
    async with connect(proxy.url) as connection:
        await connection.send(
            build_request(proxy.url, "POST", CHAT.path, CHAT.headers, body, False)
        )
        await until(lambda: any(each._reply for each in relays(proxy)))
        (gone,) = relays(proxy)
    await until(lambda: not relays(proxy))
    gone.forget()
    uses: tuple[Callable[[Any], object], ...] = (
        gone._receive,
        lambda nothing: gone._step_on(nothing, gone._exchange),
        lambda nothing: gone._look_again(nothing, True),
    )
    for use in uses:
        with pytest.raises(AttributeError, match="NoneType"):
            pytest.fail(f"{use(gone._reply)}")


def relays(proxy: RunningProxy) -> list[Any]:
    return [each for each in proxy.inside.relays if isinstance(each, Relay)]
