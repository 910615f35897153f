"""Processes that begin with the libraries imported: forked from one process that has done so, in place of 15 s each.

Each is a process of its own all the same, with its own environment, folder, output and signals, in which Fedloom and
Ray are imported anew. Variables that the libraries read when they are imported come too late.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

# None of them may leave threads or connections behind: Ray does, and is missing here.
LIBRARIES = (
    "torch",
    "datasets",
    "flwr_datasets.partitioner",
    "peft",
    "transformers.models.llama.modeling_llama",
    "mlflow.store.tracking.sqlalchemy_store",
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(list(LIBRARIES))


class Forked:
    """A module that runs as with ``python -m``, with those parts of `subprocess.Popen` that tests use."""

    def __init__(self, module, arguments, *, cwd, environment):
        """Begin. Errors go to a file, so that nobody has to read them while the output is read."""
        self.args = [module, *arguments]
        self._errors = tempfile.NamedTemporaryFile("r", encoding="utf-8")  # noqa: SIM115
        reader, writer = PROCESSES.Pipe(duplex=False)
        job = (module, arguments, str(cwd), environment, writer, self._errors.name)
        self._process = PROCESSES.Process(target=_run, args=job)
        self._process.start()
        self.pid = self._process.pid
        writer.close()
        self.stdout = open(os.dup(reader.fileno()), encoding="utf-8")  # noqa: SIM115

    @property
    def returncode(self):
        """As of `subprocess`: ``None`` while it runs, the negative number of a signal that has killed it."""
        return self._process.exitcode

    def poll(self):
        """Return what `returncode` is now."""
        return self._process.exitcode

    def send_signal(self, number):
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Wait for the end. Returns what has not been read of its output, and its errors."""
        output = self.stdout.read()
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.stdout.close()
        return output, self._errors.read()


def _run(module, arguments, cwd, environment, output, errors):
    """Become the process that was asked for."""
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:] = [cwd, *(path for path in sys.path if path != os.path.dirname(__file__))]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
