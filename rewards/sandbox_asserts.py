"""The trusted side of function tests: evaluates asserts in a confined process of their own; what belongs to the program is a proxy.

    assert f([1, 2]) == 3          f is a Proxy: the call goes over a pipe to sandbox_program.Server, plain values come back

The asserts never share a process with the program, so there is nothing for it to patch, forge or exit: it can only answer with values.
Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from winnow.rewards.sandbox_program import DETAIL, checked, described, rebuilt, receive, send
from winnow.rewards.sandbox_values import NotPlain, decode, encode


class ProgramGone(BaseException):
    """The program's process ended, or answers nonsense. No test can catch it as an Exception."""


class Client:
    """Asks the program's process."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.callbacks: list[Callable[..., Any]] = []
        self.raised: list[BaseException] = []  # exceptions that came from the program: told from the tests' own

    def keep(self, value: Any) -> dict[str, int]:
        if isinstance(value, Proxy):
            target = object.__getattribute__(value, "_target")
            if "number" not in target:
                target = {"number": self.exchange({"verb": "value", **target})["value"]["r"]}
            return {"r": target["number"]}
        if callable(value):
            self.callbacks.append(value)
            return {"c": len(self.callbacks) - 1}
        raise NotPlain(f"the tests pass a {type(value).__name__}, which is no plain value")

    def find(self, letter: str, number: int) -> Any:
        return Proxy(self, {"number": number}) if letter == "r" else self.callbacks[number]

    def exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """The program's reply to one request. Raises what the program raised, or ProgramGone."""
        with sane():
            send(self.channel, request)
            while "call_back" in (reply := receive(self.channel)):
                send(self.channel, self.called_back(reply))
            error = rebuilt(checked(reply)) if "raised" in reply else None
        if error is not None:
            self.raised.append(error)
            raise error
        return reply

    def ask(self, request: dict[str, Any]) -> Any:
        reply = self.exchange(request)
        with sane():
            return decode(reply["value"], self.find)

    def call(self, target: dict[str, Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The result; arguments that the program changed in place are changed here too."""
        plain = {"arguments": encode(list(arguments), self.keep), "options": encode(options, self.keep)}
        reply = self.exchange({"verb": "call", **plain, **target})
        with sane():
            for old, new in zip(arguments, decode(reply["arguments"], self.find), strict=True):
                update(old, new)
            return decode(reply["value"], self.find)

    def called_back(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self.callbacks[request["call_back"]]
            return {"value": encode(function(*decode(request["arguments"], self.find)), self.keep)}
        except Exception as error:
            return described(error)


@contextlib.contextmanager
def sane() -> Iterator[None]:
    """Whatever goes wrong while the program's answer is read is the program's fault."""
    try:
        yield
    except (
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ProgramGone(f"{type(error).__name__}: {error}"[:DETAIL]) from None


def update(old: Any, new: Any) -> None:
    """A list, dict or set that the program changed in place changes here as well."""
    if type(old) is not type(new) or type(old) not in (list, dict, set, bytearray):
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    else:
        old.clear()
        old.update(new)


class Proxy:
    """Something that lives in the program: a function, a class, an instance. Equal to nothing but itself: comparison is not delegated."""

    def __init__(self, client: Client, target: dict[str, Any]) -> None:
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_target", target)

    def _ask(self, verb: str, **more: Any) -> Any:
        target = object.__getattribute__(self, "_target")
        return object.__getattribute__(self, "_client").ask({"verb": verb, **more, **target})

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return object.__getattribute__(self, "_client").call(
            object.__getattribute__(self, "_target"), arguments, options
        )

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name=name, value=encode(value, object.__getattribute__(self, "_client").keep))

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(self._ask("iter"))

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))


def foreign_names(sources: list[str]) -> set[str]:
    """Names that the sources use without defining them, and that are no built-ins: what the program, or a module, must provide."""
    used: set[str] = set()
    bound: set[str] = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return {name for name in used - bound if not hasattr(builtins, name) and not name.startswith("__")}


def run_tests(job: dict[str, Any], channel: socket.socket) -> dict[str, Any]:
    """`{"loaded": null or the exception of loading, "results": [...], "end": "complete" | "gone", "detail": text}`.

    `job`: `setup` (trusted source, run first), `names` (what the program must define, whatever else is called so), `tests` (sources).
    A result is "pass", "wrong" (an assert), "raised:KIND" (the program raised) or "error:KIND" (the test itself did).
    """
    client = Client(channel)
    report: dict[str, Any] = {"loaded": None, "results": [], "end": "complete", "detail": ""}
    try:
        with sane():
            first = receive(channel)
            if "raised" in first:
                return report | {"loaded": checked(first), "end": "gone"}
        proxies = {name: Proxy(client, {"global": name}) for name in job["names"]}
        foreign = foreign_names([job["setup"], *job["tests"]]) - set(proxies)
        modules = {name for name in foreign if name in sys.stdlib_module_names}
        namespace: dict[str, Any] = {"__name__": "tests"}
        namespace |= {name: importlib.import_module(name) for name in modules}
        namespace |= {name: Proxy(client, {"global": name}) for name in foreign - modules}
        namespace |= proxies
        exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), namespace)
        namespace |= proxies  # a stub of the set-up's must not stand in for the program's
        for test in job["tests"]:
            report["results"].append(one_test(test, namespace, client))
    except (ProgramGone, EOFError, OSError, NotPlain) as error:
        report |= {"end": "gone", "detail": str(error)[:DETAIL]}
    except Exception as error:
        own = any(error is raised for raised in client.raised)
        report |= {"end": "gone" if own else "broken", "detail": f"{type(error).__name__}: {error}"[:DETAIL]}
        report["loaded"] = described(error) if own else None
    return report


def one_test(test: str, namespace: dict[str, Any], client: Client) -> str:
    try:
        exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
        return "pass"
    except Exception as error:
        if any(error is raised for raised in client.raised):
            return f"raised:{type(error).__name__}"
        return "wrong" if isinstance(error, AssertionError) else f"error:{type(error).__name__}"
