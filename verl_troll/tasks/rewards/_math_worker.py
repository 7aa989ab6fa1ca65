"""A process that compares answers with math-verify: one JSON line in, one JSON line out.

:mod:`verl_troll.tasks.rewards.math` starts it with ``-c`` and kills it when a comparison takes too long. Its own CPU
time limit ends it even if its parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys


def main() -> None:
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    # A library's output must not look like a reply.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable()
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(used.ru_utime + used.ru_stime) + seconds + 1
        allowed = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, hard))
        try:
            gold = parse(question["gold"], parsing_timeout=None)
            answer = parse(question["answer"], parsing_timeout=None)
            equal = bool(verify(gold, answer, timeout_seconds=None))
        except Exception:
            # Answers that cannot be parsed or compared are wrong.
            equal = False
        replies.write(json.dumps({"equal": equal}) + "\n")


if __name__ == "__main__":
    main()
