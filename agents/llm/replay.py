"""Answers from a transcript: for a whole search without an endpoint, or to reuse the answers of a killed process."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from agents.llm.endpoint import Answer, ChatClient, Message, Question
from protocol.errors import EndpointError, SettingsError

log = structlog.get_logger()


@dataclass(frozen=True)
class Unanswered:
    """A question that no endpoint answered, and why."""

    reason: str


class Transcript:
    """The results of questions, found by label (agent, round, call, attempt) and messages.

    If a question was asked again after a restart, the last result counts.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._results: dict[str, Answer | Unanswered] = {}
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self._results)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one record of a transcript; skip it if it is malformed."""
        try:
            key = _key(record["label"], record["messages"])
            result = _result(record)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return
        if isinstance(result, Answer) or record["endpoint"] is None:
            self._results[key] = result
        else:  # one endpoint failed; the result of the question follows in a later record
            self._results.setdefault(key, result)

    def find(self, question: Question) -> Answer | Unanswered | None:
        """Return the result of a question; None if it was never asked."""
        return self._results.get(_key(question.label, question.messages))


class Replay:
    """Answers every question from the transcript. With `strict`, a question that is not in it ends the search."""

    def __init__(self, transcript: Transcript, *, strict: bool) -> None:
        self._transcript = transcript
        self._strict = strict

    async def ask(self, question: Question) -> Answer:
        """Return the recorded answer; raise EndpointError if none was given or recorded."""
        found = self._transcript.find(question)
        if isinstance(found, Answer):
            return found
        if isinstance(found, Unanswered):
            raise EndpointError(found.reason, retryable=False)
        if self._strict:
            raise SettingsError(f"the transcript of llm.replay does not hold the question {question.label!r}")
        log.warning("replay_misses", question=question.label)
        raise EndpointError("the transcript does not hold this question", retryable=False)


class CachedChat:
    """Asks `chat` only the questions that the transcript does not answer, so that no answer is paid for twice."""

    def __init__(self, chat: ChatClient, transcript: Transcript) -> None:
        self._chat = chat
        self._transcript = transcript

    async def ask(self, question: Question) -> Answer:
        """Return the recorded answer if there is one, else ask; raise EndpointError if there is no answer."""
        found = self._transcript.find(question)
        if isinstance(found, Answer):
            log.debug("answer_remembered", question=question.label)
            return found
        return await self._chat.ask(question)


def _key(label: str, messages: Sequence[Message]) -> str:
    said = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps([label, said]).encode()).hexdigest()


def _result(record: Mapping[str, Any]) -> Answer | Unanswered:
    if record["text"] is None:
        return Unanswered(str(record["error"]))
    return Answer(
        text=str(record["text"]),
        endpoint=str(record["endpoint"]),
        prompt_tokens=int(record["prompt_tokens"]),
        completion_tokens=int(record["completion_tokens"]),
        seconds=float(record["seconds"] or 0.0),
        finish_reason=str(record["finish_reason"]),
    )
