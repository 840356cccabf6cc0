"""Values, Redis keys and files shared by the daemon, the agents and the workers. No torch, no openai, no HTTP."""
