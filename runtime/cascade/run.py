"""Run the server in this process."""

import gc
import logging
import sys

import uvicorn

from .config import Config
from .gateway import Gateway
from .limits import Limited
from .server import create_app


def build_server(gateway: Gateway, config: Config, host: str, port: int) -> uvicorn.Server:
    """The server, not yet running."""
    return uvicorn.Server(
        uvicorn.Config(
            create_app(gateway, config),
            host=host,
            port=port,
            http=Limited,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=30,
            timeout_keep_alive=30,
        )
    )


def run(gateway: Gateway, config: Config, host: str, port: int) -> int:
    """Serve until interrupted; requests under way have half a minute to end.

    Returns:
        The exit status: 0, or 1 if the port cannot be had.
    """
    log_to_stderr()
    server = build_server(gateway, config, host, port)
    gc.collect()
    gc.freeze()  # or every full collection walks all of torch, for a tenth of a second
    try:
        server.run()
    except SystemExit:
        return 1
    return 0 if server.started else 1


def log_to_stderr() -> None:
    """Log one JSON object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("skimp.serve")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False
