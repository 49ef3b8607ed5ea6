"""The console script's first lines: Ctrl-C is quiet also while Python is still importing."""

from __future__ import annotations

import signal


def main() -> None:
    """Run `cq`. Until it can say more, Ctrl-C ends it as it ends any program."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cq.cli import main as root

    root.main()


if __name__ == "__main__":
    main()
