# The image for CPUs: the service, the pipeline, `medusa rollout`, `medusa submit` and MLflow's server.
#
#   docker build -f docker/cpu.Dockerfile -t registry.example.com/medusa-on-ray-cpu:0.1.0 \
#     --build-arg TORCH_INDEX=INDEX .
#
# INDEX is where PyTorch offers its CPU builds (README.md names it); without it the image carries CUDA, several GB.
#
# The tag is part of a deployment's identity: never push another build under a tag that a cluster uses.
FROM python:3.11-slim-bookworm

# wget: KubeRay's probes of a Ray container run it. tini: reaps what Ray's workers leave behind.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home medusa

WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0

# torch first and alone: a layer of its own that changes seldom.
COPY constraints.txt ./
ARG TORCH_INDEX
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

COPY pyproject.toml README.md LICENSE ./
COPY medusa ./medusa
COPY registry ./registry
COPY pipelines ./pipelines
COPY deployments ./deployments
COPY benchmarks ./benchmarks
COPY cli ./cli
RUN pip install --constraint constraints.txt ".[cluster,grammar,tracing]"
COPY models ./models

USER 1000:1000
ENTRYPOINT ["tini", "--"]
CMD ["medusa", "--help"]
