"""Run by a Python that has the peers: does what the scripts beside the tests ask of them, in one process.

sae-lens takes longer to be imported than to do all that the tests want of it. A request is a line of standard input, a script and
the arguments of its `main` as a JSON list; the answer is a line, `done` or `failed`, the reason of which is on standard error.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path


def serve() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever the libraries print
    for line in sys.stdin:
        script, *given = json.loads(line)
        sys.path.insert(0, str(Path(script).parent))  # what lies beside a script is imported as if it had been started
        try:
            runpy.run_path(script)["main"](*given)
            answer = "done"
        except BaseException:
            traceback.print_exc()
            answer = "failed"
        sys.path.pop(0)
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    serve()
