"""A search whose LLM endpoints lie and whose Redis fails at random ends with the population of an undisturbed one.

    python -m benchmarks.hostile_llm [--minutes 5] [--seed 0]

`selfpruner daemon`, two workers with a fake evaluator, a real server. For so many minutes the LLM endpoints answer with
what tests/hostile_replies.py lists, in random order: no HTTP, endless headers, impossible numbers, megabytes of tags.
Between the processes and Redis stands a proxy that answers some commands with an error, and unreadable entries are added
to the streams and to the control key. Then the disturbances stop and the search ends. It is compared with a search
without any endpoint that ran undisturbed.

Exit code 1 where the two differ in a candidate, its provenance or its perplexity; where the daemon ended; where its
event loop was blocked for more than half a second, as its own heartbeat measured; or where a file holds a secret.
"""
