"""JupyterLab with a live kernel of this very environment: its own port, token and folders, and gone at the end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
_SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


@dataclass(frozen=True)
class Lab:
    """A running server.

    Attributes:
        address: With its port, no slash at the end.
        token: That opens it.
        folder: It serves.
    """

    address: str
    token: str
    folder: Path

    def url(self, notebook: str) -> str:
        """Where a notebook is opened, in a workspace of its own: no tab of another one stands beside it."""
        return f"{self.address}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?token={self.token}"


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    """A notebook of code cells, for the kernel that `jupyterlab` offers."""
    told = [
        {
            "cell_type": "code",
            "id": f"cell-{place}",
            "source": source,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for place, source in enumerate(cells)
    ]
    kernel = {"name": "here", "display_name": "here", "language": "python"}
    content = {"cells": told, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def jupyterlab(folder: Path) -> Iterator[Lab]:
    """Serve `folder`/notebooks; all else that Jupyter writes stays in `folder` as well."""
    served, runtime = folder / "notebooks", folder / "runtime"
    for one in (served, runtime):
        one.mkdir(parents=True)
    for name, values in _SETTINGS.items():
        target = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        target.parent.mkdir(parents=True)
        target.write_text(json.dumps(values))
    kernel = folder / "data" / "kernels" / "here" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    token, log = secrets.token_hex(16), folder / "log.txt"
    options = {
        "ServerApp.ip": HOST,
        "ServerApp.port": 0,  # any that is free; the file in the runtime folder says which
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": served,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.terminals_enabled": False,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    own = {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": runtime,
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "PYTHONPATH": ROOT,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            env=os.environ | {name: str(value) for name, value in own.items()},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Lab(_answering(server, runtime, token, log), token, served)
    finally:
        _end(server)


def _answering(server: subprocess.Popen[bytes], runtime: Path, token: str, log: Path) -> str:
    """Wait until the server answers; its address."""
    stop = time.monotonic() + 240
    while time.monotonic() < stop:
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        for told in runtime.glob("jpserver-*.json"):
            try:
                address = f"http://{HOST}:{json.loads(told.read_text())['port']}"
                with urlopen(f"{address}/api/status?token={token}", timeout=5):  # noqa: S310 - our own server
                    return address
            except (URLError, OSError, ValueError):  # written by half, or not listening yet
                pass
        time.sleep(0.1)
    raise TimeoutError(f"JupyterLab did not answer:\n{log.read_text()[-3000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Asked to end, the server ends its kernels too."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
