"""`python -m fusedopt`: the commands `info`, `demo` and `check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fusedopt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: those of this process) name, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt", description="Fused optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedopt {fusedopt.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("info", help="print versions, backends, devices, what is missing, and how to get it")
    commands.add_parser("demo", add_help=False, help="train a network with torch.optim and with fusedopt, and compare")
    commands.add_parser("check", add_help=False, help="compile and execute the rules of a file of yours for GPUs that are not here")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "demo":
        from fusedopt import demo

        return demo.main(rest)
    if chosen.command == "check":
        from fusedopt import check

        return check.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from fusedopt import info

    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
