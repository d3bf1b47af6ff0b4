# Serves a model over HTTP (docs/guides/serve.md). Built from the project's root, with BuildKit:
#   docker build --file launch/serve.Dockerfile --tag dlm-serve .
#   docker build --file launch/serve.Dockerfile --tag dlm-serve:cuda --build-arg EXTRAS=serve,cuda .
# and run with a key; without one it ends with a sentence:
#   DLM_API_KEY=secret docker run --env DLM_API_KEY --publish 127.0.0.1:8000:8000 --volume "$PWD/runs:/models:ro" \
#       --volume dlm-cache:/cache --stop-timeout 30 dlm-serve --model=/models/assistant
# NVIDIA GPUs need --gpus all, and on the host their driver and the NVIDIA Container Toolkit.
FROM python:3.12-slim

# The extras that are installed. CUDA's libraries come with jax, so that both images have the same base.
ARG EXTRAS=serve

# Process 1 ignores signals that it does not handle. Under tini, SIGTERM ends the server while it loads a model, too.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/*

# The dependencies change less often than the code.
WORKDIR /opt/dlm_jax
COPY requirements.txt setup.py pyproject.toml ./
COPY dlm_jax/__init__.py dlm_jax/
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]"
COPY README.md ./
COPY dlm_jax dlm_jax
COPY configs configs
COPY assets assets
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# /cache keeps compiled programs and what comes from the Hugging Face hub.
RUN useradd --create-home --uid 10001 dlm && install --directory --owner=dlm /models /cache
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
VOLUME ["/models", "/cache"]
WORKDIR /models
USER 10001

EXPOSE 8000
# The first start compiles, which takes minutes with a large model.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# The shell checks the key and is replaced by the server, which gets the signals.
ENTRYPOINT ["tini", "--", "sh", "-c", \
    ": \"${DLM_API_KEY:?must be set to a key of your choice, as all of the network can reach a container}\"; \
    exec dlm serve --host=0.0.0.0 --port=8000 \"$@\"", "dlm-serve"]
CMD ["--model=stories"]
