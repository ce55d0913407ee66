# The image for NVIDIA GPUs. CUDA's libraries come with torch's wheel; the node brings the driver.
#
#   docker build -f docker/gpu.Dockerfile -t registry.example.com/medusa-on-ray-gpu:0.1.0 .
#
# The tag is part of a deployment's identity: never push another build under a tag that a cluster uses.
FROM python:3.11-slim-bookworm

# wget: KubeRay's probes of a Ray container run it. tini: reaps what Ray's workers leave behind.
# gcc, libc6-dev: Triton compiles the launcher of each kernel on the machine that runs it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget tini gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home medusa

WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# torch first and alone: a layer of its own that changes seldom.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY medusa ./medusa
COPY registry ./registry
COPY pipelines ./pipelines
COPY deployments ./deployments
COPY benchmarks ./benchmarks
COPY cli ./cli
RUN pip install --constraint constraints.txt ".[cluster,gpu,grammar,tracing]"
COPY models ./models

USER 1000:1000
ENTRYPOINT ["tini", "--"]
CMD ["medusa", "--help"]
