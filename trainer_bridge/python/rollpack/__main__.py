"""`python -m rollpack`: what a running server says of itself, as one JSON object."""

from __future__ import annotations

import argparse
import json
import sys

from rollpack.client import connect
from rollpack.errors import RollpackError


def main() -> int:
    """Print health, weight version, fingerprint and counters; 1 when the server cannot be asked."""
    parser = argparse.ArgumentParser(prog="python -m rollpack", description=__doc__)
    parser.add_argument("--socket", help="default: ROLLPACK_SOCKET, else run/rollpack.sock")
    parser.add_argument("--timeout-s", type=float, default=10.0)
    arguments = parser.parse_args()
    try:
        with connect(arguments.socket, timeout_s=arguments.timeout_s) as client:
            state = {
                "status": client.health(),
                "weight_version": (version := client.get_weight_version()),
                "weights_hash": version.weights_hash,
                "fingerprint": client.info.fingerprint,
                "num_slots": client.info.num_slots,
                "stats": client.stats(),
            }
    except RollpackError as error:
        print(f"rollpack: {error}", file=sys.stderr)
        return 1
    print(json.dumps(state, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
