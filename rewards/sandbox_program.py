"""What runs a program inside the sandbox: by itself, or serving the calls of tests that live in another process.

    run_program    the program with its own stdin and stdout, as `python program.py` would
    serve_program  loads the program, then answers calls over a pipe with plain values (sandbox_values.py); sandbox_asserts.py makes them

Nothing here can be trusted once the program is loaded, and nothing here is: what counts is compared elsewhere. Standard library only.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import json
import os
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from winnow.rewards.sandbox_values import NotPlain, decode, encode

HEADER = struct.Struct(">I")
MAX_FRAME = 64 << 20  # bytes of one call or result
DETAIL = 200  # characters of a message
STOPS = (StopIteration, StopAsyncIteration)


def send(channel: socket.socket, value: Any) -> None:
    """One JSON frame. Raises OSError when the other side is gone, NotPlain when it is too large."""
    text = json.dumps(value).encode()
    if len(text) > MAX_FRAME:
        raise NotPlain(f"{len(text)} bytes are more than {MAX_FRAME}")
    channel.sendall(HEADER.pack(len(text)) + text)


def receive(channel: socket.socket) -> Any:
    """The next frame. Raises EOFError when the other side is gone, NotPlain for what is no frame of JSON."""
    (length,) = HEADER.unpack(exactly(channel, HEADER.size))
    if length > MAX_FRAME:
        raise NotPlain(f"a frame of {length} bytes")
    try:
        return json.loads(exactly(channel, length))
    except (ValueError, RecursionError) as error:
        raise NotPlain(f"a malformed frame ({type(error).__name__})") from None


def exactly(channel: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = channel.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the other side is gone")
        data += chunk
    return bytes(data)


def load(source: str, name: str) -> types.ModuleType:
    """Runs the source as a module of this name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    return module


def write_files(files: dict[str, str]) -> None:
    """The task's own files, in the scratch folder that is the current one."""
    for name, text in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)


def open_standard_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def forget_ourselves() -> None:
    """Our own modules are no business of the program's."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "winnow"]:
        del sys.modules[name]
    sys.argv[:] = ["program.py"]


def run_program(source: str) -> int:
    """The exit status, as the interpreter would set it."""
    open_standard_streams()
    forget_ourselves()
    status = 0
    try:
        load(source, "__main__")
    except SystemExit as error:
        status = exit_status(error)
    except BaseException as error:
        status = 1
        show(error)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as the interpreter does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 120
    return status


def exit_status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def show(error: BaseException) -> None:
    """The traceback; where there is no room for one, the exception's name."""
    try:
        traceback.print_exception(error, limit=-20, file=sys.stderr)
        sys.stderr.flush()
    except BaseException:
        os.write(2, f"\n{type(error).__name__}\n".encode())


def described(error: BaseException) -> dict[str, Any]:
    """An exception by the names of its classes, nearest first."""
    try:
        message = str(error)[:DETAIL]
    except BaseException:
        message = ""
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "message": message}


def checked(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply that tells of an exception, as `described` would have it: the program may have written anything. Raises NotPlain."""
    names, message = reply["raised"], reply["message"]
    if not (isinstance(names, list) and names and all(isinstance(text, str) for text in (*names, message))):
        raise NotPlain("an exception without a name")
    plain = [text[:DETAIL].encode("utf-8", "replace").decode() for text in (message, *names[:DETAIL])]
    return {"raised": plain[1:], "message": plain[0]}


def rebuilt(reply: dict[str, Any]) -> Exception:
    """The program's exception as the nearest built-in Exception, so that a test may expect it.

    Never a StopIteration: raised by a function under `map`, it would end the test's loop as if all had been well.
    """
    for name in reply["raised"]:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, STOPS):
            try:
                return kind(reply["message"])
            except TypeError:  # UnicodeDecodeError and the like want more arguments
                continue
    return RuntimeError(f"{reply['raised'][0]}: {reply['message']}")


# --------------------------------------------------------------------------------------------------------------- the program's side


class Server:
    """Answers the tests' calls. Objects that are no plain values stay in `kept`; the tests hold their numbers."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.kept: list[Any] = []
        self.module: types.ModuleType | None = None

    def keep(self, value: Any) -> dict[str, int]:
        self.kept.append(value)
        return {"r": len(self.kept) - 1}

    def find(self, letter: str, number: int) -> Any:
        return self.kept[number] if letter == "r" else lambda *arguments: self.call_back(number, arguments)

    def call_back(self, number: int, arguments: tuple[Any, ...]) -> Any:
        """Calls a function of the tests', which wait for our result; on its way it may call us."""
        send(self.channel, {"call_back": number, "arguments": encode(arguments, self.keep)})
        while "verb" in (reply := receive(self.channel)):
            self.respond(reply)
        if "raised" in reply:
            raise rebuilt(reply)
        return decode(reply["value"], self.find)

    def serve(self, source: str) -> None:
        """Loads the program, says so, and answers until the tests are done."""
        try:
            self.module = load(source, "program")
        except BaseException as error:  # a SystemExit too: the program left before it could be asked
            send(self.channel, described(error))
            return
        send(self.channel, {"value": None})
        while True:
            self.respond(receive(self.channel))

    def respond(self, request: dict[str, Any]) -> None:
        try:
            text = json.dumps(self.answer(request))  # before it is sent: half a frame could not be taken back
        except BaseException as error:
            text = json.dumps(described(error))
        self.channel.sendall(HEADER.pack(len(text)) + text.encode())

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self.target(request)
        verb = request["verb"]
        if verb == "call":
            arguments = decode(request["arguments"], self.find)
            options = decode(request["options"], self.find)
            value = encode(target(*arguments, **options), self.keep)
            return {"value": value, "arguments": encode(arguments, self.keep)}
        if verb == "set":
            setattr(target, request["name"], decode(request["value"], self.find))
            return {"value": None}
        value = getattr(target, request["name"]) if verb == "get" else OPERATIONS[verb](target)
        return {"value": encode(value, self.keep)}

    def target(self, request: dict[str, Any]) -> Any:
        if "number" in request:
            return self.kept[request["number"]]
        try:
            return getattr(self.module, request["global"])
        except AttributeError:
            raise NameError(f"name {request['global']!r} is not defined") from None


OPERATIONS: dict[str, Callable[[Any], Any]] = {"len": len, "str": str, "repr": repr, "iter": list, "value": lambda v: v}


def serve_program(source: str, channel: socket.socket) -> int:
    open_standard_streams()
    server = Server(channel)
    forget_ourselves()
    with contextlib.suppress(EOFError, OSError):  # the tests are done
        server.serve(source)
    with contextlib.suppress(BaseException):  # the program may have put anything there
        sys.stdout.flush()
    return 0
