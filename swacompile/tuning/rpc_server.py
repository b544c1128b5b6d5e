"""A TVM RPC server for a fleet that outlives the kernels it is sent. Run it on each machine that is to measure:

    python -m swacompile.tuning.rpc_server --tracker 127.0.0.1:9190 --key h100

It names its device, and measures candidates as this machine's tuner does: each in a process of its own. TVM's own server (python -m tvm.exec.rpc_server)
calls kernels in its session and stops listening when one crashes it; this one listens again. Like it, this one runs whatever it is sent, for anyone who
reaches its port: use it on a loopback interface or a trusted, closed network only.
"""

import argparse
import functools
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from swacompile.tuning import runner

MEASURE = "swacompile.tuning.measure"
"""The function of a session that runs a job, as JSON, in the session's folder."""
DEVICE = "swacompile.tuning.device"
"""The function of a session that names the server's device of a kind ("cpu", "cuda"): name and driver as JSON, null where
there is none."""

log = logging.getLogger(__name__)


def serve(host: str, tracker: tuple[str, int], key: str) -> None:
    """Register at a tracker and run sessions, one at a time. Never returns."""
    runner.without_torch()
    import tvm_ffi
    from tvm.rpc import server

    tvm_ffi.register_global_func(MEASURE, _measure, override=True)
    tvm_ffi.register_global_func(DEVICE, _device, override=True)
    for kind in ("cpu", "cuda"):
        log.info("%s device: %s", kind, _device(kind))  # kept: sessions are forks of this process
    home = os.getcwd()
    while True:
        os.chdir(home)  # a session works in a folder of its own, and a crash leaves us there
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((host, 0))
            listener.listen(1)
            port = listener.getsockname()[1]
            log.info("key %s: listening on %s:%d", key, host, port)
            try:
                server._listen_loop(listener, port, key, tracker, None, host)
            except (RuntimeError, OSError) as error:
                log.warning("a session failed: %s", error)


def _measure(text: str) -> str:
    """A job's result, measured in a process of its own, so that times are those that a local run takes: over RPC TVM adds to
    short calls, and has neither tensor maps nor CUDA graphs.
    """
    import tvm_ffi

    workpath = tvm_ffi.get_global_func("tvm.rpc.server.workpath")
    job = json.loads(text)
    folder = Path(str(workpath("")))
    return json.dumps(runner.run_contained(job, folder, threads=job["threads"], seconds=job["seconds"]))


@functools.cache
def _device(kind: str) -> str:
    try:
        return json.dumps(runner.device_of(kind))
    except SystemExit:
        return json.dumps(None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="swacompile.tuning.rpc_server", description="Measure kernels for a tracker's clients."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; reachable by trusted machines only")
    parser.add_argument("--tracker", required=True, help="host:port of `python -m tvm.exec.rpc_tracker`")
    parser.add_argument("--key", required=True, help="name of this kind of device")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    host, _, port = options.tracker.rpartition(":")
    serve(options.host, (host, int(port)), options.key)
    return 0


if __name__ == "__main__":
    sys.exit(main())
