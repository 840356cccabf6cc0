"""A fake evaluation process that misbehaves according to its script.

`python fake_evaluator.py SCRIPT`, SCRIPT a JSON file: {"profile", "parameters", "log", "prepare", "behaviours"}.
`behaviours` maps a candidate's id, or `*`, to what its first, second, … evaluation does; the last one goes on. Each
evaluation is noted in `log` as it begins, so that a test can count them.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SCRIPT = json.loads(Path(sys.argv[1]).read_text())
LOG = Path(SCRIPT["log"])
TROUBLE: dict[str, Any] = {
    "nan": {"perplexity": float("nan")},
    "inf": {"perplexity": float("inf")},
    "negative": {"perplexity": -1.0},
    "string": {"perplexity": "low"},
    "missing": {"perplexity": None},
}


def say(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)


def measured(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a perplexity that is better if the first layers are kept; equal for equal plans."""
    kept = sum((i + 1) * layer["mlp_channels"] for i, layer in enumerate(plan["layers"]))
    return {
        "kind": "measured",
        "perplexity": 10 + kept / 64,
        "parameters": SCRIPT["parameters"],
        "tokens": 62,
        "seconds": 0.0,
    }


def misbehave(behaviour: str) -> dict[str, Any] | None:
    """Perform the behaviour; returns the failed outcome if it is one."""
    word, _, figure = behaviour.partition(":")
    match word:
        case "sleep":
            time.sleep(float(figure))
        case "hold-gil":
            ctypes.PyDLL(None).usleep(int(float(figure) * 1e6))  # unlike CDLL, PyDLL keeps the lock
        case "raise":
            raise RuntimeError("the evaluation went wrong")
        case "abort":
            os.abort()
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(LOG)])
            time.sleep(600)
        case "abort-with-grandchild":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(LOG)])
            os.abort()
        case "out-of-memory":
            return {"kind": "failed", "reason": "out-of-memory", "detail": "CUDA out of memory"}
        case "device-lost":
            return {"kind": "failed", "reason": "crashed", "detail": "CUDA error: device-side assert triggered"}
        case "usage-error-when-replaced":
            while json.loads(Path(sys.argv[1]).read_text() or "{}").get("prepare", behaviour) == behaviour:
                time.sleep(0.05)
            say({"usage_error": "the model is gone"})
        case "usage-error":
            say({"usage_error": "the GPU is gone"})
        case "garbage":
            sys.stdout.write("no JSON at all\n")
    return None


def evaluate(request: dict[str, Any]) -> None:
    id_ = request["id"]
    begun = LOG.read_text().split().count(id_) if LOG.exists() else 0
    with LOG.open("a") as log:
        log.write(f"{id_}\n")
    todo = SCRIPT["behaviours"].get(id_) or SCRIPT["behaviours"]["*"]
    behaviour = todo[min(begun, len(todo) - 1)]
    outcome = misbehave(behaviour) or measured(request["plan"])
    outcome.update(TROUBLE.get(behaviour, {}))
    say({"id": id_, "outcome": {} if behaviour == "empty" else outcome})


def main() -> None:
    requests = iter(lambda: sys.stdin.readline(), "")
    next(requests)
    misbehave(SCRIPT.get("prepare", ""))
    say({"profile": SCRIPT["profile"]})
    for line in requests:
        evaluate(json.loads(line))
    os.killpg(0, signal.SIGKILL)  # as the evaluation process does when its parent is gone


def end_with_parent() -> None:
    """Watch the parent's pipe from a thread, to end within an evaluation too, like the evaluation process."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.05)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    main()
