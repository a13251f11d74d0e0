"""The guard itself: neither this process nor one that a test starts reaches anything."""

import socket
import subprocess
import sys

import pytest


def test_connecting_and_asking_for_names_raise():
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address reserved for documentation
    with pytest.raises(OSError, match="no network"):
        socket.getaddrinfo("example.org", 443)


def test_processes_that_tests_start_inherit_the_guard():
    code = "import socket; socket.socket().connect(('192.0.2.1', 80))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "the tests have no network" in done.stderr
