"""A TVM RPC server for a fleet that outlives the kernels it is sent. Run it on each machine that is to measure:

    python -m swacompile.tuning.rpc_server --tracker 127.0.0.1:9190 --key h100

TVM's own server (python -m tvm.exec.rpc_server) stops listening when a kernel crashes its session's process; this one listens again. Like it,
this one runs whatever it is sent, for anyone who reaches its port: use it on a loopback interface or a trusted, closed network only.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence

log = logging.getLogger(__name__)


def serve(host: str, tracker: tuple[str, int], key: str) -> None:
    """Register at a tracker and run sessions, one at a time. Never returns."""
    from tvm.rpc import server

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
