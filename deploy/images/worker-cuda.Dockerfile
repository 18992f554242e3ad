# syntax=docker/dockerfile:1
# A prefill or decode worker on NVIDIA GPUs: torch's CUDA build and what the `gpu` extra names. The driver
# and libibverbs' device access come from the node. Build from the project's root:
#   docker build -f deploy/images/worker-cuda.Dockerfile -t penumbra/worker-cuda:0.1.0 .
FROM python:3.11.14-slim-bookworm AS build
ARG MARCH=x86-64-v3
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md ./
COPY deploy/images/requirements.py deploy/images/requirements.py
RUN python -m venv --without-pip /opt/penumbra \
    && python deploy/images/requirements.py worker-cuda > /tmp/requirements.txt \
    && pip --python /opt/penumbra install --no-cache-dir --no-compile -r /tmp/requirements.txt
COPY . .
RUN PENUMBRA_MARCH=$MARCH pip --python /opt/penumbra install --no-cache-dir --no-compile --no-deps .

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="penumbra-worker-cuda" \
      org.opencontainers.image.description="Prefill and decode workers of a Penumbra cluster, on NVIDIA GPUs"
# Triton and NVRTC compile kernels at run time; Triton links its launcher with a C compiler.
RUN apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev \
        libgomp1 libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/penumbra /opt/penumbra
ENV PATH=/opt/penumbra/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
EXPOSE 50051 50052
ENTRYPOINT ["penumbra"]
CMD ["prefill"]
