"""What runs inside the sandbox: it forks the program away, then tests it over a pipe. Standard library only.

This file is sent to a bare interpreter (it is never imported there) and must not import anything of ours.
Two processes: the CHECKER (process 1 of its namespace) runs the tests and owns the verdict channel; the
PROGRAM, a child, runs the untrusted code. They share no memory, and the program holds neither the tests,
which are read after the fork, nor the nonce, nor the channel. What the program returns is rebuilt from plain
data, so no method of its objects ever runs in the checker: an `__eq__` that is always true is just a handle
there, equal to nothing.

Input on descriptor 0: a line of seven integers (bytes of the program, bytes of the rest, CPU seconds, bytes
of address space, processes (0: no limit), bytes of a file, bytes of a message), the program, then
NUL-separated: nonce, names that the program provides ("" = any that is not a builtin), tests. Output on
descriptor 1: `ready`, and at the end `nonce passed total detail`.
"""

import builtins
import os
import sys

try:
    import _signal as signals
except ImportError:
    import signal as signals
import resource


class Wire:
    """Values over two pipes, in a format of our own: pickle would run code, json is slow to import."""

    def __init__(self, receive, send, limit, keep, load):
        """`keep` turns an object into the number of a handle, `load` a number into what stands for it."""
        self.receive, self.sender, self.limit, self.keep, self.load = receive, send, limit, keep, load

    def read(self, size):
        parts = []
        while size:
            part = os.read(self.receive, min(size, 1 << 20))
            if not part:
                raise EOFError("the program ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def get(self):
        size = int(self.read(16), 16)
        if size > self.limit:
            raise ValueError("the message is too long")
        return self.decode(self.read(size), 0)[0]

    def put(self, value):
        out = []
        self.encode(value, out)
        data = b"".join(out)
        data = b"%016x" % len(data) + data
        while data:
            data = data[os.write(self.sender, data) :]

    def encode(self, value, out):
        if value is None or value is True or value is False:
            out.append({None: b"N", True: b"T", False: b"F"}[value])
        elif isinstance(value, int):
            self.leaf(b"i", b"%x" % value if value >= 0 else b"-%x" % -value, out)
        elif isinstance(value, float):
            self.leaf(b"f", float.__repr__(value).encode(), out)
        elif isinstance(value, complex):
            self.leaf(b"c", (repr(value.real) + " " + repr(value.imag)).encode(), out)
        elif isinstance(value, str):
            self.leaf(b"s", str.encode(value, "utf-8", "surrogatepass"), out)
        elif isinstance(value, (bytes, bytearray)):
            self.leaf(b"b" if isinstance(value, bytes) else b"a", bytes(value), out)
        elif isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            self.leaf(b"y", value.__name__.encode(), out)
        elif isinstance(value, dict):
            self.many(b"D", [x for pair in dict.items(value) for x in pair], out)
        else:
            for kind, tag in KINDS:
                if isinstance(value, kind):
                    self.many(tag, list(kind.__iter__(value)), out)
                    return
            if hasattr(type(value), "__next__"):
                self.many(b"G", [x for x, _ in zip(value, range(100000), strict=False)], out)
            else:
                self.leaf(b"h", self.keep(value).encode(), out)

    def leaf(self, tag, data, out):
        out.append(tag + b"%x:" % len(data))
        out.append(data)

    def many(self, tag, values, out):
        out.append(tag + b"%x:" % len(values))
        for value in values:
            self.encode(value, out)

    def decode(self, data, at):
        tag = data[at : at + 1]
        if tag in b"NTF" and tag:
            return {b"N": None, b"T": True, b"F": False}[tag], at + 1
        colon = data.index(b":", at, at + 20)
        size, at = int(data[at + 1 : colon], 16), colon + 1
        if tag in MANY:
            values = []
            for _ in range(size):
                value, at = self.decode(data, at)
                values.append(value)
            return MANY[tag](values), at
        body = data[at : at + size]
        if tag == b"h":
            return self.load(int(body)), at + size
        if tag not in LEAF or len(body) != size:
            raise ValueError("the message is malformed")
        return LEAF[tag](body), at + size


class Handle:
    """A value of the program that is no plain data: it can be handed back, and equals nothing else."""

    def __init__(self, number):
        self.number = number


def pairs(values):
    return dict(zip(values[::2], values[1::2], strict=True))


KINDS = ((list, b"L"), (tuple, b"U"), (set, b"S"), (frozenset, b"Z"), (range, b"L"))
MANY = {b"L": list, b"U": tuple, b"S": set, b"Z": frozenset, b"G": iter, b"D": pairs}
LEAF = {
    b"i": lambda b: int(b, 16),
    b"f": float,
    b"c": lambda b: complex(*map(float, b.split())),
    b"s": lambda b: b.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"y": lambda b: {t.__name__: t for t in vars(builtins).values() if isinstance(t, type)}[b.decode()],
    b"a": bytearray,
}


def run_program(source, wire):
    """The untrusted side: define the program's names, then answer calls until the pipe closes."""
    space = {"__name__": "__main__"}
    try:
        exec(compile(source, "<program>", "exec"), space)
    except BaseException as error:
        wire.put(("error", type(error).__name__, str(error)[:300]))
        return
    wire.put(("ready",))
    while True:
        request = wire.get()
        try:
            if request[0] == "name":
                reply = describe(request[1], space)
            else:
                _, target, args, named = request
                reply = ("value", space[target](*args, **named))
        except Exception as error:  # whatever the tested program raises is its answer
            reply = ("error", type(error).__name__, str(error)[:300])
        wire.put(reply)


def describe(name, space):
    if name not in space:
        return ("missing",)
    value = space[name]
    if type(value) is type(os):
        return ("module", value.__name__)
    return ("callable",) if callable(value) else ("value", value)


class Names(dict):
    """Globals of the tests: a name that they do not define is looked up in the program."""

    def __init__(self, wire, provided):
        super().__init__({"__name__": "__tests__", "__builtins__": builtins})
        self.wire, self.provided = wire, provided

    def __missing__(self, name):
        if name not in self.provided and hasattr(builtins, name):
            raise KeyError(name)
        self.wire.put(("name", name))
        reply = self.wire.get()
        if reply[0] == "module" and reply[1].split(".")[0] in sys.stdlib_module_names:
            value = __import__(reply[1], fromlist=["*"])
        elif (self.provided and name not in self.provided) or reply[0] not in ("value", "callable"):
            raise KeyError(name)
        else:
            value = self.caller(name) if reply[0] == "callable" else reply[1]
        self[name] = value
        return value

    def caller(self, name):
        def call(*args, **named):
            self.wire.put(("call", name, list(args), named))
            reply = self.wire.get()
            if reply[0] == "value":
                return reply[1]
            kind = getattr(builtins, str(reply[1]), None)
            good = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if good else RuntimeError)(str(reply[2]))

        return call


def no_handle(value):
    if isinstance(value, Handle):
        return str(value.number)
    raise TypeError("a test passes an object that cannot be sent to the program: " + type(value).__name__)


def check(wire, provided, tests):
    """(tests passed, what went wrong first). A test passes when it runs to its end without an exception."""
    first = wire.get()
    if first[0] != "ready":
        return 0, f"{first[1]}: {first[2]}"
    passed, detail = 0, ""
    names = Names(wire, provided)
    for test in tests:
        try:
            exec(compile(test, "<test>", "exec"), names)
            passed += 1
        except (EOFError, BrokenPipeError):
            return passed, detail or "the program ended before its tests"
        except BaseException as error:
            detail = detail or f"{type(error).__name__}: {error}"
    return passed, detail


def exactly(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            raise EOFError("incomplete input")
        data += part
    return data


def main():
    header = b""
    while not header.endswith(b"\n"):
        header += exactly(1)
    size, rest, cpu, memory, processes, file_size, message = map(int, header.split())
    source = exactly(size)
    for name in (signals.SIGINT, signals.SIGTERM, signals.SIGHUP, signals.SIGPIPE):
        signals.signal(name, signals.SIG_IGN)
    limits = [("RLIMIT_CPU", cpu), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", file_size), ("RLIMIT_CORE", 0)]
    limits += [("RLIMIT_NOFILE", 64)] + ([("RLIMIT_NPROC", processes)] if processes else [])
    for name, value in limits:
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.setrecursionlimit(3000)
    down, up = os.pipe(), os.pipe()
    if os.fork() == 0:
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.dup2(down[0], 3), os.dup2(up[1], 4)
        os.closerange(5, 64)
        table = {}

        def keep(value):
            table[len(table)] = value
            return str(len(table) - 1)

        try:
            run_program(source, Wire(3, 4, 1 << 40, keep, table.get))
        finally:
            os._exit(0)
    os.close(down[0]), os.close(up[1])
    os.write(1, b"ready\n")
    nonce, provided, *tests = exactly(rest).decode("utf-8", "surrogatepass").split("\0")
    try:
        passed, detail = check(Wire(up[0], down[1], message, no_handle, Handle), provided.split(), tests)
    except BaseException as error:
        passed, detail = 0, f"{type(error).__name__}: {error}"
    detail = " ".join(detail.split())[:300]
    os.write(1, f"{nonce} {passed} {len(tests)} {detail}\n".encode("utf-8", "replace"))
    os._exit(0)


main()
