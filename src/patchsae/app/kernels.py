"""Kernels of visitors, all forks of one process that has loaded the explorer: they share its memory.

A kernel that loads everything itself takes 390 MB and ten seconds; a fork takes 80 MB and half a second.
"""

import asyncio
import multiprocessing
import os
from importlib.metadata import EntryPoint

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

_forks = multiprocessing.get_context("forkserver")


def load() -> None:
    """Start the process that kernels are forked from, and wait until it has loaded the explorer of ``PROFILE``.

    It computes on the processor and in one thread: neither a GPU nor a pool of threads survives a fork.
    """
    KernelProvisionerFactory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:ForkedProvisioner", "")
    KernelProvisionerFactory.instance(default_provisioner_name="forked")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    _forks.set_forkserver_preload(["patchsae.app.preload", __name__])
    first = _forks.Process()
    first.start()
    first.join()


def serve_visitor(connection_file: str, environment: dict[str, str]) -> None:
    """Be the kernel of one visitor."""
    from ipykernel.kernelapp import IPKernelApp
    from ipywidgets import register_comm_target

    os.environ |= environment
    # The parent is named so that no kernel outlives it.
    kernel = IPKernelApp.instance(connection_file=connection_file, parent_handle=os.getppid())
    kernel.initialize(["--HistoryManager.enabled=False"])
    register_comm_target()
    kernel.start()


class ForkedProvisioner(LocalProvisioner):
    """Forks kernels instead of running the command of the kernel's specification."""

    async def launch_kernel(self, cmd: list[str], **options) -> dict:
        """Start a kernel."""
        self.process = _forks.Process(target=serve_visitor, args=(self.parent.connection_file, options["env"]),
                                      daemon=True)
        self.process.start()
        return self.connection_info

    async def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.exitcode if self.process else 0

    async def wait(self) -> int | None:
        """The exit status, waited for."""
        while (status := await self.poll()) is None:
            await asyncio.sleep(0.05)
        self.process = None
        return status

    async def send_signal(self, signum: int) -> None:
        """As ``os.kill``, if it still runs."""
        if await self.poll() is None:
            os.kill(self.process.pid, signum)
