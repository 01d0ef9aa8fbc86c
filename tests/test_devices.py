"""What a process does with its memory."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from lab7.devices import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept():
    faults = {}
    for what in ("keep", "return"):
        command = [sys.executable, "-c", COUNT_FAULTS, what]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        faults[what] = int(output)
    assert faults["keep"] < 0.1 * faults["return"]
