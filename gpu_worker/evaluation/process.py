"""The evaluation process: loads the model of one spec once, then receives plans and answers with outcomes.

gpu_worker/worker/evaluator.py starts `python -m gpu_worker.evaluation.process` and exchanges JSON lines with it::

    in   {"spec": SearchSpec, "sensitivity": bool, "self_text": JSON}   once; the text may be null
    out  {"progress": {"stage", "done", "total"}}                       during preparation
    out  {"log": {"level", "event", ...}}                               at any time, for the parent's log
    out  {"self_text": JSON}                                            text that the model wrote, if none is published
    in   {"self_text": JSON}                                            the published text, to be used from now on
    out  {"usage_error": sentence}                                      invalid input; the process ends with code 2
    out  {"profile": ModelProfile}                                      the model is ready
    in   {"id", "plan", "text", "race"}                                 one candidate at a time
    out  {"id", "outcome"}

The replies are written to a private copy of stdout; stdout itself is redirected to stderr, for the output of libraries.
The process ends when stdin closes, even during an evaluation, so that it never outlives its parent.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import MutableMapping
from functools import partial
from typing import Any, NoReturn

import structlog

PROGRESS_EVERY = 0.5
"""Seconds between two progress reports of the same stage."""
EXIT_USAGE = 2
EXIT_DEVICE_LOST = 3

Lines = queue.SimpleQueue[bytes]


class Replies:
    """Writes messages to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._stage = ""
        self._reported = 0.0

    def send(self, message: dict[str, Any]) -> None:
        """Send one message immediately."""
        try:
            self._file.write(json.dumps(message, default=str) + "\n")
            self._file.flush()
        except BrokenPipeError:  # the parent has ended
            os._exit(0)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report the progress of a stage: its first and last step, and some steps between them."""
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._reported < PROGRESS_EVERY:
            return
        self._stage, self._reported = stage, now
        self.send({"progress": {"stage": stage, "done": done, "total": total}})

    def log(self, _logger: Any, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        """Send an event to the parent, which writes the log (a structlog processor)."""
        self.send({"log": {"level": level, **event}})
        raise structlog.DropEvent


def take_stdout() -> Replies:
    """Reserve stdout for messages and redirect descriptor 1 to stderr."""
    private = os.dup(1)
    os.dup2(2, 1)
    return Replies(private)


def read_requests(descriptor: int, lines: Lines) -> None:
    """Put each line into `lines`; end the process and its children when the parent has ended.

    Reads the descriptor directly, because a thread that waits in `sys.stdin` holds a lock that the interpreter needs to
    exit.
    """
    rest = b""
    while block := os.read(descriptor, 1 << 16):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            lines.put(line)
    if os.getpgrp() == os.getpid():  # the parent created the group for this process
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def keep_libraries_quiet() -> None:
    """Disable the progress bars and warnings of libraries, because users read the parent's log."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TQDM_DISABLE", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def let_segments_grow() -> None:
    """Let torch extend its segments of GPU memory: each plan has other shapes, for which the last one left no room.

    Must be called before torch is imported. A user's own choice stays.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def offer_text(lines: Lines, replies: Replies, text: str) -> str:
    """Offer text that the model wrote to the search; return the published text, which may be another worker's."""
    replies.send({"self_text": text})
    counts: str = json.loads(lines.get())["self_text"]
    return counts


def serve(lines: Lines, replies: Replies) -> int:
    """Prepare the model, then answer requests; return an exit code after an error."""
    # Imported here because torch takes seconds to import, and stdout must be redirected first.
    from gpu_worker.evaluation.outcomes import DeviceLostError, answer, out_of_memory_as_usage_error
    from gpu_worker.evaluation.session import Session
    from gpu_worker.measuring.half_precision import products_in_float32
    from gpu_worker.measuring.self_text import share_text
    from protocol.errors import StoreError, UsageError
    from protocol.plans.candidate import Failed
    from protocol.plans.spec import SearchSpec

    order = json.loads(lines.get())
    spec = SearchSpec.model_validate(order["spec"])
    shared = partial(share_text, order.get("self_text"), partial(offer_text, lines, replies))
    with products_in_float32():
        try:
            with out_of_memory_as_usage_error(spec.model):
                session = Session(spec, replies.progress, sensitivity=order["sensitivity"], share_text=shared)
        except (UsageError, StoreError) as error:
            replies.send({"usage_error": str(error)})
            return EXIT_USAGE
        replies.send({"profile": session.profile.model_dump(mode="json")})
        while True:
            request = json.loads(lines.get())
            try:
                outcome = answer(session, request)
            except DeviceLostError as error:
                outcome = Failed(reason="crashed", detail=str(error))
            replies.send({"id": request["id"], "outcome": outcome.model_dump(mode="json")})
            if isinstance(outcome, Failed) and outcome.reason == "crashed":
                return EXIT_DEVICE_LOST


def main() -> int:
    """Run the process; the exit code is 2 for invalid input, 3 for a lost device."""
    replies = take_stdout()
    lines: Lines = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(0, lines), daemon=True).start()
    keep_libraries_quiet()
    let_segments_grow()
    structlog.configure(processors=[replies.log])
    try:
        return serve(lines, replies)
    except Exception as error:  # noqa: BLE001  (a process boundary: unexpected errors belong in the parent's log)
        structlog.get_logger().error("evaluation_process_failed", error=repr(error), traceback=traceback.format_exc())
        return 1


if __name__ == "__main__":
    sys.exit(main())
