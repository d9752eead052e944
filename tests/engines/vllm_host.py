"""Makes vLLM engines: ``python vllm_host.py SOCKET``, in vLLM's environment.

vLLM takes six seconds of CPU to import, an engine three to start. So this process imports it once and forks a child
for each connection: a process of its own, with its own engine, log and environment, as if it had been started alone.
It has no other thread, and no gRPC, when it forks. Ends at the end of its standard input; a child, at the end of
its connection. Messages are lines of JSON: ``{"do": ..., ...}``, answered by ``{"ok": ...}`` or
``{"error": ..., "message": ...}``.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path


def main() -> None:
    import torch
    import transformers
    import vllm
    from vllm.entrypoints.llm import LLM  # the part that takes long
    from vllm.v1.engine.core import EngineCore

    assert torch and transformers and LLM and EngineCore
    import vllm_driver

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would lose them"
    gc.collect()
    gc.freeze()  # what exists now is shared: collections in children need not walk it, nor copy its pages
    print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}), flush=True)
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in ready:
                return
            if listener in ready:
                connection, _ = listener.accept()
                if os.fork() == 0:
                    break
                connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child(connection, vllm_driver)


def child(connection: socket.socket, driver: object) -> None:
    """Answers messages until the other end closes."""
    with connection, connection.makefile("r", encoding="utf-8") as lines:
        job = driver.Driver()  # type: ignore[attr-defined]
        for line in lines:
            message = json.loads(line)
            if message["do"] == "hello":
                _redirect(Path(message["log"]))
                os.environ.update(message.get("env", {}))
                import torch

                torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the pool was sized at the import
                answer: dict[str, object] = {"ok": {"pid": os.getpid()}}
            else:
                answer = _answer(job, message)
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _answer(job: object, message: dict[str, object]) -> dict[str, object]:
    what = str(message.pop("do"))
    try:
        return {"ok": getattr(job, f"do_{what}")(**message)}
    except Exception as error:  # noqa: BLE001 - told to the test, which judges it
        traceback.print_exc()
        text = " | ".join(str(part) for part in _chain(error))
        return {"error": type(error).__name__, "message": text}


def _chain(error: BaseException) -> list[BaseException]:
    found = [error]
    while (following := found[-1].__cause__ or found[-1].__context__) is not None and following not in found:
        found.append(following)
    return found


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
