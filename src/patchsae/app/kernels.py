"""Kernels of visitors, all forks of one process that has loaded the explorer: they share its memory.

A kernel that loads everything itself takes 390 MB and ten seconds; a fork takes 80 MB and one.
"""

import multiprocessing
import os
from importlib.metadata import EntryPoint

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

#: The name by which Jupyter knows how kernels are started here.
FORKED = "forked"
KernelProvisionerFactory.provisioners[FORKED] = EntryPoint(FORKED, f"{__name__}:ForkedProvisioner", "")
_forks = multiprocessing.get_context("forkserver")


def load() -> None:
    """Start the process that kernels are forked from, and wait until it has loaded the explorer of ``PROFILE``.

    It computes on the processor and in one thread: neither a GPU nor a pool of threads survives a fork.
    """
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    _forks.set_forkserver_preload(["patchsae.app.preload"])
    first = _forks.Process()
    first.start()
    first.join()


class KernelProcess(_forks.Process):
    """A kernel; and the names of ``subprocess.Popen`` that Jupyter calls a process by."""

    stdin = stdout = stderr = None

    def __init__(self, connection_file: str, environment: dict[str, str], folder: str):
        super().__init__(daemon=True)
        self.connection_file, self.environment, self.folder = connection_file, environment, folder

    def run(self) -> None:
        """Serve one visitor."""
        from ipykernel.kernelapp import IPKernelApp
        from ipywidgets import register_comm_target

        os.setsid()
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        # The parent is named so that no kernel outlives it.
        kernel = IPKernelApp.instance(connection_file=self.connection_file, parent_handle=os.getppid())
        kernel.initialize(["--HistoryManager.enabled=False"])
        register_comm_target()
        kernel.start()

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self.exitcode

    def wait(self) -> int | None:
        """The exit status, waited for."""
        self.join()
        return self.exitcode

    def send_signal(self, signum: int) -> None:
        """As ``os.kill``."""
        os.kill(self.pid, signum)


class ForkedProvisioner(LocalProvisioner):
    """Forks kernels instead of running the command of the kernel's specification."""

    async def launch_kernel(self, cmd: list[str], **options) -> dict:
        """Start a kernel; what remains is as for any other."""
        self.process = KernelProcess(self.parent.connection_file, options["env"], options["cwd"])
        self.process.start()
        self.pid = self.pgid = self.process.pid
        return self.connection_info
