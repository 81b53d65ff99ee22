"""A process that runs the code it is sent, line by line, so that a dozen tests pay for the imports once.

    {"code": "...", "arguments": {...}}  ->  {"result": ...} or {"error": text, "kind": class} or {"traceback": text}

What the code assigns to `result` comes back; what hf_zipit raises on purpose does as an error.
"""

from __future__ import annotations

import json
import sys
import traceback

import hf_zipit  # noqa: F401  (the imports that are paid for once)
from hf_zipit.errors import ZipItError


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what the code prints is no answer
    for line in sys.stdin:
        sent = json.loads(line)
        names = dict(sent["arguments"])
        try:
            exec(sent["code"], names)
            answer = {"result": names.get("result")}
        except ZipItError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except Exception:
            answer = {"traceback": traceback.format_exc()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
