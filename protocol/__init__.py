"""What the daemon, the agents and the workers agree on: values, keys, files. No torch, no openai, no HTTP."""
