"""Peak memory of a piece of work, measured in a child of its own."""

from __future__ import annotations

import ctypes
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # malloc.h


def peak_bytes(warm_up: Callable[[], object], work: Callable[[], object]) -> int:
    """Resident memory that `work` takes at its peak beyond what there was before.

    `warm_up` runs the same code on little data, so that the libraries' own pages are there already.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            # glibc gives freed memory back at once instead of keeping it for later
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
            # A thread of its own has a heap of its own. That of this one has holes where tests before had memory, and what is put
            # there is not given back; where their pages were (malloc_trim), it would count as taken, too.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(warm_up).result()
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                before = status_bytes("VmRSS")
                pool.submit(work).result()
            os.write(writer, pickle.dumps(status_bytes("VmHWM") - before))
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as file:
        return pickle.loads(file.read())


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
