"""Two nodes on one machine: network namespaces with an SSH server each, connected by a virtual cable.

The nodes share the file system, like those of a cluster. Each has its own host name, addresses, ports and
loopback interface. `deepspeed` reaches them as it reaches any node: by their names in a hostfile, with `ssh`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
SSH_PORT = 2222
PREFIX = "adalrs-test"
PATIENCE = 300.0
"""Seconds to wait for an event that takes one second on an idle machine."""
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class NoNodes(Exception):
    """This machine cannot have nodes; the message has the reason."""


class Node:
    """A network namespace with a host name."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        self.namespace = f"{PREFIX}-{os.getpid()}-{name}"

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        return subprocess.Popen([*inside, *named], text=True, start_new_session=True, **options)

    def boot(self) -> None:
        """Start the SSH server, and wait until it listens."""
        log = self._folder / f"sshd-{self.name}.log"
        with log.open("w") as file:
            server = [
                str(shutil.which("sshd", path=SEARCHED)),
                "-D",
                "-e",
                "-f",
                str(self._folder / "sshd_config"),
            ]
            process = self.start(server, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        wait_until(
            lambda: "Server listening" in log.read_text() or process.poll() is not None, "an SSH server"
        )
        if process.poll() is not None:
            raise NoNodes(f"sshd does not start: {log.read_text().strip()}")

    def processes(self) -> list[int]:
        """Return the process ids of the node."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Send SIGKILL to every process, including the SSH server and its sessions."""

        def all_have_ended() -> bool:
            left = [pid for pid in self.processes() if not is_zombie(pid)]
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        wait_until(all_have_ended, f"the end of all processes of {self.name}")

    def set_link(self, state: str) -> None:
        """Set the network link "up" or "down"."""
        run("ip", "-n", self.namespace, "link", "set", "eth0", state)


class Cluster:
    """Two nodes, and the launch of a job from the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = [Node("node-a", "10.73.0.1", folder), Node("node-b", "10.73.0.2", folder)]
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{node.name} slots=1\n" for node in self.nodes))
        self._environment_of_nodes = folder / "deepspeed_env"
        self._write_ssh_files()

    def connect(self) -> None:
        """Create the namespaces and the cable.

        Raises:
            NoNodes: This machine does not allow it.
        """
        try:
            for node in self.nodes:
                run("ip", "netns", "add", node.namespace)
            first, second = self.nodes
            ends = [
                "eth0",
                "netns",
                first.namespace,
                "type",
                "veth",
                "peer",
                "eth0",
                "netns",
                second.namespace,
            ]
            run("ip", "link", "add", *ends)
            for node in self.nodes:
                run("ip", "-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
                run("ip", "-n", node.namespace, "link", "set", "lo", "up")
                node.set_link("up")
            Path("/run/sshd").mkdir(exist_ok=True)  # required by sshd
        except (subprocess.CalledProcessError, OSError) as error:
            raise NoNodes(f"no network namespaces: {getattr(error, 'stderr', None) or error}") from error
        for node in self.nodes:
            node.boot()

    def launch(self, root: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
        """Run `deepspeed --hostfile` on the first node; all nodes get the environment variables."""
        self._environment_of_nodes.write_text(
            "".join(f"{name}={value}\n" for name, value in environment.items())
        )
        launcher = (
            os.environ
            | environment
            | {
                "PATH": f"{self.folder / 'bin'}:{SEARCHED}",
                "DS_ENV_FILE": str(self._environment_of_nodes),
            }
        )
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--hostfile",
            str(self.hostfile),
            *arguments,
        ]
        log = self.folder / "launcher.log"
        with log.open("w") as file:
            return self.nodes[0].start(
                command, cwd=root, env=launcher, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def output(self) -> str:
        return (self.folder / "launcher.log").read_text()

    def remove(self) -> None:
        existing = run("ip", "netns", "list").split()
        for node in self.nodes:
            if node.namespace in existing:
                node.kill()
                run("ip", "netns", "delete", node.namespace)

    def _write_ssh_files(self) -> None:
        """Throw-away keys, and an `ssh` that reads a configuration of its own in place of ~/.ssh/config."""
        for key in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "sshd_config").write_text(
            f"Port {SSH_PORT}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile "
            f"{self.folder}/user_key.pub\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\nUsePAM "
            "no\nPidFile none\n"
        )
        hosts = "".join(f"Host {node.name}\n  HostName {node.address}\n" for node in self.nodes)
        (self.folder / "ssh_config").write_text(
            f"{hosts}Host *\n  Port {SSH_PORT}\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  BatchMode yes\n"
            # Without these, `deepspeed` waits without end for the ssh of a node that is out of reach.
            "  ServerAliveInterval 3\n  ServerAliveCountMax 3\n"
        )
        ssh = self.folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)


@contextmanager
def two_nodes(folder: Path) -> Iterator[Cluster]:
    """Create a cluster of two nodes, and remove it and its processes at the end of the context.

    Raises:
        NoNodes: This machine cannot have nodes.
    """
    if os.geteuid() != 0:
        raise NoNodes("network namespaces need root")
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCHED)]
    if missing:
        raise NoNodes(f"not installed: {', '.join(missing)}")
    remove_remains()
    cluster = Cluster(folder)
    try:
        cluster.connect()
        yield cluster
    finally:
        cluster.remove()


def remove_remains() -> None:
    """Remove the namespaces of earlier test processes that were killed."""
    for namespace in re.findall(rf"^{PREFIX}-\d+-\S+", run("ip", "netns", "list"), re.MULTILINE):
        if not Path(f"/proc/{namespace.split('-')[2]}").exists():
            for pid in run("ip", "netns", "pids", namespace).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", namespace)


def run(*command: str) -> str:
    """Run a command that must succeed and return its standard output."""
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": SEARCHED}
    ).stdout


def is_zombie(pid: int) -> bool:
    """Return whether a process has ended and was not waited for."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> float:
    """Wait until a condition holds and return the seconds that it took.

    Raises:
        TimeoutError: The condition does not hold in time; the message names `what`.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)
    return time.monotonic() - started
