"""A process that answers questions with a library: one JSON line in, one JSON line out.

:mod:`verl_troll.tasks.rewards.worker` starts it with ``-c`` and kills it when an answer takes too long. Its own CPU
time limit ends it even if its parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import runpy
import sys
from typing import Any


def main() -> None:
    memory, seconds, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    # A library's output must not look like a reply.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reply(found: dict[str, Any]) -> None:
        replies.write(json.dumps(found) + "\n")

    try:
        answer = runpy.run_path(program)["load"]()

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        logging.disable()
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        reply({"ready": True})
        for line in sys.stdin:
            used = resource.getrusage(resource.RUSAGE_SELF)
            allowed = int(used.ru_utime + used.ru_stime) + seconds + 1
            allowed = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
            resource.setrlimit(resource.RLIMIT_CPU, (allowed, hard))
            reply(answer(json.loads(line)))
    except ImportError as error:
        reply({"missing": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
