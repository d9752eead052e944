"""A process that has imported everything and forks children on request: a cycle of crash and reopen costs no imports.

Asked by lines of JSON: {"fork": task, "how": {...}} is answered by the child's pid, {"wait": pid} by its wait status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    from crash_tasks import TASKS

    for line in sys.stdin:
        ask = json.loads(line)
        if "wait" in ask:
            answer = os.waitpid(ask["wait"], 0)[1]
        else:
            answer = os.fork()
            if not answer:
                status = 1
                try:
                    TASKS[ask["fork"]](**ask["how"])
                    status = 0
                except BaseException:  # noqa: BLE001 - the process's edge: printed, and its status says it
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
