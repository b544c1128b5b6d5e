"""The process that talks to one RPC server at a time for `fleet`.

TVM's client blocks where a server is gone, so it can be killed.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from swacompile.errors import TargetError
from swacompile.tuning import runner
from swacompile.tuning.rpc_server import DEVICE, MEASURE
from swacompile.tuning.worker import Document, serve


class Client:
    """Answers requests: count the servers of a key, open a session, run a job in it, or close it unused."""

    def __init__(self) -> None:
        self._session: Any = None
        self._can_measure = False

    def answer(self, request: Document) -> Document:
        action = {"count": self._count, "open": self._open, "run": self._run, "close": self._close}[request["do"]]
        return action(request)

    def _count(self, request: Document) -> Document:
        from tvm import rpc

        try:
            tracker = rpc.connect_tracker(request["host"], request["port"])
            summary = tracker.summary()
        except Exception as error:
            return {"count": 0, "message": f"{type(error).__name__}: {error}"}
        name = f"server:{request['key']}"
        return {"count": sum(server["key"] == name for server in summary["server_info"]), "message": ""}

    def _open(self, request: Document) -> Document:
        """`device`: name and driver of the server's; None where it cannot tell, as TVM's own server cannot."""
        from tvm import rpc

        self._session = None
        try:
            tracker = rpc.connect_tracker(request["host"], request["port"])
            session = tracker.request(request["key"], session_timeout=int(request["seconds"]) + 1, max_retry=1)
            device = _device_of(session, request["device"])
        except Exception as error:
            return {"message": f"{type(error).__name__}: {error}"}
        self._session, self._can_measure = session, device is not None
        return {"message": "", "device": device}

    def _close(self, _request: Document) -> Document:
        self._session = None
        return {"message": ""}

    def _run(self, request: Document) -> Document:
        """`broken` where the session failed, for whatever reason.

        Only further attempts tell a bad kernel from a lost server.
        """
        start = time.monotonic()
        session, self._session = self._session, None
        job, folder = request["job"] | {"seconds": request["seconds"]}, Path(request["folder"])
        run = run_there if self._can_measure else run_job
        try:
            return run(session, job, folder)
        except Exception as error:
            seconds = time.monotonic() - start
            text = str(error).strip().splitlines()
            return {"status": "broken", "seconds": seconds, "message": f"{type(error).__name__}: {(text or [''])[-1]}"}


def _device_of(session: Any, kind: str) -> list[str | None] | None:
    try:
        ask = session.get_function(DEVICE)
    except AttributeError:
        return None
    device: list[str | None] | None = json.loads(ask(kind))
    if device is None:
        raise TargetError(f"the server has no {kind} device")
    return device


def run_job(session: Any, job: dict[str, Any], folder: Path) -> Document:
    """What `runner.run_job` does, on a server that only has TVM, for a CPU.

    Operands are sent, outputs fetched and checked here, times taken there.
    """
    session.get_function("runtime.config_threadpool")(1, job["threads"])
    session.upload(str(folder / job["library"]))
    module, device = session.load_module(job["library"]), session.cpu(0)
    samples: list[float] = []
    for problem in job["problems"]:
        arrays = runner.operands(problem)
        tensors = [_send(array, runner.type_name(array, problem["dtype"]), device) for array in arrays]
        arguments = [*tensors, *runner.scalars(problem)]
        module[job["function"]](*arguments)
        output = tensors[-1].numpy().view(runner.element_bytes(problem["dtype"]))
        wrong = runner.wrong_rows(problem, output, np.load(folder / problem["expected"], allow_pickle=False))
        if wrong is not None:
            return {"status": "wrong", "samples": [], "message": wrong}
        if problem["timed"]:
            timer = module.time_evaluator(
                job["function"], device, number=1, repeat=job["samples"], min_repeat_ms=int(job["min_ms"])
            )
            samples = [seconds * 1e6 for seconds in timer(*arguments).results]
    return {"status": "ok", "samples": samples, "message": ""}


def run_there(session: Any, job: dict[str, Any], folder: Path) -> Document:
    """Send a job with its files; the server measures it as a bundle's runner would."""
    library = Path(job["library"])
    names = [library.name, library.with_suffix(".json").name, *(problem["expected"] for problem in job["problems"])]
    for name in names:
        if (folder / name).exists():
            session.upload(str(folder / name))
    result: Document = json.loads(session.get_function(MEASURE)(json.dumps(job)))
    return result


def _send(array: Any, name: str, device: Any) -> Any:
    """A copy of an array on the server."""
    import ml_dtypes
    import tvm

    tensor = tvm.runtime.empty(array.shape, name, device)
    if array.size:
        whole = np.ascontiguousarray(array)
        tensor.copyfrom(whole.view(ml_dtypes.bfloat16) if name == "bfloat16" else whole)
    return tensor


if __name__ == "__main__":
    runner.without_torch()
    serve(Client().answer)
