"""Processes that tests start."""

import signal


def hear_sigint() -> None:
    """For `subprocess.Popen(preexec_fn=...)`: a suite in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
