"""Runs a command and tells what it took; started anew for each, and as small as can be.

A process begins with the peak memory of the one that started it, so that all that the bench itself
starts would seem to be at least as large as the bench.

    python -ISB bench/meter.py FILE COMMAND...      what it took goes into FILE, as JSON
"""

# Nothing else is imported, for its size.
import os
import sys
import time

begin = time.monotonic()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
end = time.monotonic()
with open(sys.argv[1], "w") as file:  # noqa: PTH123
    file.write(
        f'{{"begin": {begin}, "end": {end}, "code": {os.waitstatus_to_exitcode(status)},'
        f' "processor": {usage.ru_utime + usage.ru_stime}, "peak": {usage.ru_maxrss}}}'
    )
