"""How a verb ends other than well: by something that the user can mend, or because it was asked to end."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""What schedulers, terminals and people end a job with."""
EX_TEMPFAIL = 75
"""Exit code of a run that saved and ended because it was asked to: start the same command again (sysexits.h)."""


class UserError(ValueError):
    """Something that the user can mend: the message names the key or file, its value, and the remedy.

    Every other ValueError is a defect of this package and keeps its traceback.
    """


class Interrupted(Exception):
    """The run was asked to end, and all ranks know it.

    Args:
        received: The signal.
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received
        self.exit_code = 130 if received == signal.SIGINT else EX_TEMPFAIL
