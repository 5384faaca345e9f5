"""The command `mpq`, also as `python -m mpq`."""

import signal


def command() -> None:
    """Run the command line. Ctrl-C while that is imported ends it as it ends any program, without a traceback."""
    heard = signal.getsignal(signal.SIGINT)
    if heard is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mpq.cli.main import main

    signal.signal(signal.SIGINT, heard)
    main()


if __name__ == "__main__":
    command()
