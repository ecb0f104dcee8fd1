"""The processes that train together: `accelerate launch` or torchrun starts them, and here they meet.

All of them run the same program on the same rows, so whatever decides what happens next is known to each. What is
split among them is work: which groups a process samples, which micro-batches it computes, which part of the
weights it holds. The main process alone reads standard input, writes files, grades, and speaks.

Nothing else asks for a rank. A process that was started alone is a world of its own, and torch is not even imported for it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from s2dcli import console
from s2dcli.errors import EXIT_FAILED, S2DError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# What accelerate launch and torchrun tell each process that they start
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TOLD_TOO = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
# What accelerate passes on of plans that are made for its own training loop: variable, what it asks for, what to do
_REFUSED = (
    ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", "--use_fsdp --fsdp_version 2 shards the same"),
    ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", "--use_fsdp --fsdp_version 2 shards the same"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallelism", "--use_fsdp --fsdp_version 2 shards the weights"),
    ("FSDP_OFFLOAD_PARAMS", "FSDP's offloading", "leave it out"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP's activation checkpointing", "s2d's own option is --gradient-checkpointing"),
)
MEET_SECONDS = 1800  # for all processes to start
WAIT_DAYS = 7  # for the others at a meeting point: however long the main process grades or saves, and no death goes unnoticed
# A host that is gone sends nothing: after IDLE seconds of silence it is asked, PROBES times, every INTERVAL seconds.
IDLE, INTERVAL, PROBES = 10, 5, 3
GRACE = 5.0  # seconds in which an error of the network, and the news of what caused it, find each other


_environment: MutableMapping[str, str] = os.environ  # or a copy of it, while a library is not to see what is told in it


def rank() -> int:
    """Number of this process, from 0."""
    return int(_environment["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Number of this process on its host, from 0."""
    return int(_environment["LOCAL_RANK"]) if size() > 1 else 0


def size() -> int:
    """How many processes there are."""
    return int(_environment["WORLD_SIZE"]) if all(name in _environment for name in _TOLD) else 1


@contextmanager
def hidden(**more: str) -> Iterator[None]:
    """Within this, child processes and libraries are told nothing of the other processes, and `more` of the environment."""
    global _environment
    _environment = dict(os.environ)
    try:
        for name in (*_TOLD, *_TOLD_TOO):
            os.environ.pop(name, None)
        os.environ.update(more)
        yield
    finally:
        for name in more:
            os.environ.pop(name, None)
        os.environ.update(_environment)
        _environment = os.environ


def is_main() -> bool:
    """Whether this process writes what all of them have made: files, results, messages."""
    return rank() == 0


def shards() -> bool:
    """Whether weights, gradients and optimizer states are split over the processes (FSDP2): each holds a part of every tensor."""
    return size() > 1 and _asked("ACCELERATE_USE_FSDP")


def reshards() -> bool:
    """Whether a sharded layer gives up the others' parts between its forward and backward pass (accelerate's default)."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "no_shard", "shard_grad_op")


def check(command: str, *, trains: bool) -> None:
    """Raise UsageError if this process was launched in a way in which `command` does not run."""
    if size() == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
            raise UsageError(
                "accelerate was asked for several processes and has started one: on a CPU it needs --multi_gpu, and no --cpu",
                hint="accelerate launch --multi_gpu --num_processes N -m s2dcli ..., or torchrun --nproc-per-node N -m s2dcli ...",
            )
        return
    if not trains:
        raise UsageError(f"s2d {command} is one process, and {size()} were launched", hint=f"s2d {command}, without the launcher")
    for variable, what, hint in _REFUSED:
        if _asked(variable):
            raise UsageError(f"accelerate's configuration asks for {what}, which s2d does not use", hint=hint)
    if shards() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("accelerate's configuration asks for FSDP 1; s2d shards by FSDP 2", hint="--fsdp_version 2")
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        console.warn("accelerate's mixed_precision is not used: --dtype and --weights say what computes and what is kept in which type")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


# Meeting


class _World:
    """The processes after they have met: torch's groups of them, and the watch that they keep on each other."""

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=MEET_SECONDS))
        dist = torch.distributed
        # What is no tensor of a GPU goes through the CPUs.
        self.cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=WAIT_DAYS))
        port, token = _broadcast((None, None), self.cpu_group) if rank() else (None, None)
        listener = None
        if not rank():
            listener, token = _listen(), secrets.token_hex()
            _broadcast((listener.getsockname()[1], token), self.cpu_group)
        self.watch = _Watch(listener, port, token)


_world: _World | None = None


def start() -> None:
    """Meet the other processes, unless that has been done or there are none."""
    global _world
    if size() > 1 and _world is None:
        _world = _World()


def _group() -> torch.distributed.ProcessGroup:
    start()
    return _world.cpu_group


def _broadcast(value: T, group: torch.distributed.ProcessGroup) -> T:
    import torch

    held = [value]
    torch.distributed.broadcast_object_list(held, src=0, group=group)
    return held[0]


def broadcast(value: T) -> T:
    """Return the main process's value."""
    return value if size() == 1 else _broadcast(value, _group())


def from_main(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call a function in the main process alone; returns its value in all of them. An error ends the others silently."""
    if size() == 1:
        return function(*arguments, **named)
    start()
    outcome: tuple[T | None, S2DError | None] = (None, None)
    if is_main():
        try:
            outcome = function(*arguments, **named), None
        except S2DError as error:
            outcome = None, error
    value, error = broadcast(outcome)
    if error is not None and not is_main():
        _world.watch.end(None)
        raise SystemExit(error.exit_code)
    if error is not None:
        raise error
    return value


def gather(value: T) -> list[T]:
    """Return the value of every process, in the order of their ranks."""
    if size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * size()
    torch.distributed.all_gather_object(values, value, group=_group())
    return values


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors, the same ones in every process, by their sums over all processes."""
    if size() == 1:
        return
    import torch

    works = [torch.distributed.all_reduce(tensor, group=_group_of(tensor), async_op=True) for tensor in tensors]
    for work in works:
        work.wait()


def send_out(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor by the main process's; returns it."""
    if size() > 1:
        import torch

        torch.distributed.broadcast(tensor, src=0, group=_group_of(tensor))
    return tensor


def stream(items: Iterable[tuple[str, torch.Tensor]] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the main process's named tensors in every process, one by one; the others' `items` are not looked at."""
    if size() == 1:
        yield from items
        return
    import torch

    source = iter(items) if is_main() else iter(())
    while True:
        name, tensor = next(source, ("", None))
        found = broadcast((name, tensor.shape, tensor.dtype) if tensor is not None else None)
        if found is None:
            return
        name, shape, dtype = found
        yield name, send_out(tensor.contiguous() if is_main() else torch.empty(shape, dtype=dtype))


def _group_of(tensor: torch.Tensor) -> torch.distributed.ProcessGroup | None:
    start()
    return _world.cpu_group if tensor.device.type == "cpu" else None


# Parting


def leave() -> None:
    """Part from the others at a command's good end, when all are there."""
    global _world
    if _world is not None:
        import torch

        torch.distributed.barrier(group=_world.cpu_group)
        _world.watch.end(None)
        torch.distributed.destroy_process_group()
        _world = None


def ending(text: str, error: BaseException) -> str | None:
    """Tell the others that this process ends with an error. Returns what it has to say, None if another process says it.

    Where the death of another process has caused the error, that is what there is to say.
    """
    if size() == 1 or _world is None:  # what is wrong with a command line every process finds
        return text if is_main() else None
    # An error of our own may be the others' too; a launcher that has seen a process die terminates the rest.
    seconds = GRACE
    if isinstance(error, S2DError | KeyboardInterrupt | SystemExit):
        seconds = 0.0 if is_main() and isinstance(error, S2DError) else 1.0
    lost = _world.watch.lost(seconds)
    _world.watch.end(text)
    if lost is not None:
        return None if lost.message.endswith(text) else str(lost)
    if is_main():
        return text
    return f"process {rank()} of {size()}: {text}" if isinstance(error, Exception) else None


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


class _Line:
    """A connection that carries JSON values, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tuned = {"TCP_KEEPIDLE": IDLE, "TCP_KEEPINTVL": INTERVAL, "TCP_KEEPCNT": PROBES}
        for name, value in {**tuned, "TCP_USER_TIMEOUT": 1000 * (IDLE + INTERVAL * PROBES)}.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection, self._reader = connection, connection.makefile("rb")

    def send(self, value: Any) -> None:
        with suppress(OSError):  # whoever is gone is noticed by its silence
            self._connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """Return the next value, None when the other side is gone."""
        try:
            return json.loads(self._reader.readline() or b"null")
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class _Watch:
    """A connection between the main process and each other one, which the kernel closes however a process ends.

    So a death is noticed at once, that of a host after IDLE + INTERVAL * PROBES seconds, whatever a process is busy with:
    heartbeats would stop in a process that only loads or saves for long. The main process passes the news on. Who waits for
    the dead one gets an error from the network, and asks here what it means; a wait that does not end is ended from here.
    """

    def __init__(self, listener: socket.socket | None, port: int | None, token: str) -> None:
        """The main process listens, the others connect to its `port`; who does not know the token is no process of ours."""
        self._lines: dict[int, _Line] = {}
        self._names: dict[int, str] = {}
        self._news = threading.Event()
        self._error: S2DError | None = None
        self._lock = threading.Lock()
        self._left = False  # this process has said how it ends, or is about to
        if listener is None:
            line = _Line(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=MEET_SECONDS))
            line.send({"token": token, "rank": rank(), "name": f"pid {os.getpid()} on {platform.node()}"})
            self._lines[0] = line
            self._names[0] = line.receive() or ""
        else:
            self._accept(listener, token)
        for number, line in self._lines.items():
            threading.Thread(target=self._follow, args=(number, line), daemon=True).start()

    def _accept(self, listener: socket.socket, token: str) -> None:
        with listener:
            while len(self._lines) < size() - 1:
                line = _Line(listener.accept()[0])
                hello = line.receive()
                if not isinstance(hello, dict) or hello.get("token") != token:
                    line.close()
                    continue
                self._lines[hello["rank"]], self._names[hello["rank"]] = line, hello["name"]
                line.send(f"pid {os.getpid()} on {platform.node()}")

    def _follow(self, number: int, line: _Line) -> None:
        """Wait for what another process says of its end, or for the silence after it."""
        said = line.receive()
        if said == {"end": None}:
            return
        if isinstance(said, dict) and "lost" in said:  # the main process passes on what it has noticed
            self._lose(said["lost"], said["resumable"])
            return
        how = f"ended: {said['end']}" if isinstance(said, dict) else "was killed or has crashed"
        self._lose(f"process {number} of {size()} ({self._names[number]}) {how}", said is None)

    def _lose(self, what: str, resumable: bool) -> None:
        with self._lock:
            if self._left or self._error:
                return
            hint = "--resume continues after the last saved step, also with another number of processes"
            self._error = S2DError(what, hint=hint if resumable else "")
        if is_main():
            for line in self._lines.values():
                line.send({"lost": what, "resumable": resumable})
        self._news.set()
        time.sleep(GRACE)  # in which the main thread, if an error ends its wait, ends the process in good order
        with self._lock:
            if self._left:
                return
            self._left = True
        console.error(str(self._error))
        os._exit(EXIT_FAILED)

    def lost(self, seconds: float) -> S2DError | None:
        """Return the error that says which process is gone, if that is known within some seconds; the caller then says it."""
        self._news.wait(seconds)
        with self._lock:
            if self._error is not None:
                self._left = True
            return self._error

    def end(self, text: str | None) -> None:
        """Tell the others how this process ends: in good order, or by an error."""
        with self._lock:
            self._left = True
        for line in self._lines.values():
            line.send({"end": text})
            line.close()
