"""The whole of `selfpruner daemon`: a search whose workers, Redis and LLM run elsewhere."""

import signal
from functools import partial

from daemon.http_api.token import Access
from daemon.launch.launch import Launch
from daemon.launch.run_here import announce, configure_logs
from daemon.monitor.summary import Summary
from daemon.search.make_agents import check_proposer
from daemon.settings.settings import Settings
from protocol.errors import SettingsError
from protocol.runtime import logs
from protocol.runtime.signals import run_until_signal


def run_daemon(settings: Settings, stream: logs.Stream) -> tuple[Summary | None, signal.Signals | None, Access | None]:
    """Search to the end, or until a signal. Returns the summary if there is one, the signal, and the API's access.

    Raises UsageError for invalid settings before anything is started.
    """
    redis_url = settings.redis.full_url
    if redis_url is None:
        raise SettingsError("the setting redis.url is missing: the daemon needs a Redis server that workers reach too")
    check_proposer(settings.search)
    if settings.search.asks_llm and not settings.llm.endpoints and not settings.llm.replay:
        raise SettingsError("the setting llm.endpoints is missing: give at least one OpenAI-compatible endpoint")
    access = configure_logs(settings, stream)
    launch = Launch(
        settings,
        redis_url,
        settings.llm.endpoints,
        embedded=False,
        access=access,
        announce=partial(announce, access),
    )
    return *run_until_signal(launch.run()), access
