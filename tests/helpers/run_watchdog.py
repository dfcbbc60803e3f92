"""Ends everything that a test run has started when the run ends, however it ends.

Engines run in sessions and processes of their own, and neither Ctrl-C nor a killed pytest reaches all of them. Each
run therefore sets an environment variable with a name of its own, which its processes inherit, and starts this file
as a program in a session of its own. It knows of the end of the run by its stdin, a pipe that nobody else holds.

vLLM and Ray overwrite the memory in which the system looks for the environment of a process when they name it. So
processes are noted while they start, and their children with them.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil

PREFIX = "INT8KV_TEST_RUN_"
WATCH_SECONDS = 1.0
"""Between looks; a process of vLLM imports longer than that before it takes a name."""
NUM_SWEEPS = 5
"""After the end; a process that is being killed may just have started another."""


def start() -> subprocess.Popen:
    """Watch over this process: what it starts from here on ends with it. Keep what is returned."""
    marker = PREFIX + uuid.uuid4().hex
    command = [sys.executable, str(Path(__file__).resolve()), marker, str(os.getpid())]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    watchdog = subprocess.Popen(command, **options)
    # A forked child would hold the pipe open for as long as it lives; one that executes a program does not.
    os.register_at_fork(after_in_child=watchdog.stdin.close)
    os.environ[marker] = "1"
    return watchdog


class Watch:
    """The processes of a run, as far as they have been seen.

    Args:
        marker: the name of the variable.
        run: the process of the run, which began without the variable; None if it has ended.
    """

    def __init__(self, marker: str, run: psutil.Process | None) -> None:
        self._marker, self._run = marker, run
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        """Note the processes that carry the marker, and the children of those and of the run."""
        parents = {process.pid: process for process in (*self._seen, self._run) if process is not None}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or is another user's
                if process not in self._seen and self._belongs(process, parents):
                    self._seen.add(process)

    def _belongs(self, process: psutil.Process, parents: dict[int, psutil.Process]) -> bool:
        if process.pid == os.getpid() or process == self._run:
            return False
        parent = parents.get(process.ppid())
        # The system gives numbers again, hence the second look.
        return self._marker in process.environ() or (parent is not None and process.parent() == parent)

    def kill(self) -> None:
        for _ in range(NUM_SWEEPS):
            self.look()
            for process in self._seen:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.1)


def main() -> None:
    marker, pid = sys.argv[1], int(sys.argv[2])
    watch, is_over = Watch(marker, psutil.Process(pid) if psutil.pid_exists(pid) else None), threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        is_over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while not is_over.wait(WATCH_SECONDS):
        watch.look()
    watch.kill()


if __name__ == "__main__":
    main()
