"""The `cometlm` command. It says how threads wait before torch is loaded, which asks but once.

Between two products, OpenMP's threads wait for the next by turning in circles. Turning for less
long costs nothing alone, and beside another process on the same cores a quarter to a third of the
time remains (`benchmarks/waiting.py`). A library should not decide that for a program; a command
may.
"""

import os
import signal

_ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SHORT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}  # of GNU's library, and of LLVM's


def run() -> None:
    """Entry point. What the environment says of waiting is left as it is."""
    if not any(name in os.environ for name in _ASKED):
        os.environ.update(_SHORT)
    try:
        from cometlm.cli.main import run as cli
    except KeyboardInterrupt:  # torch and transformers take seconds
        raise SystemExit(128 + signal.SIGINT) from None
    cli()
