# syntax=docker/dockerfile:1
# A prefill or decode worker on CPUs: torch's CPU build and our kernels compiled for x86-64 with AVX2 or, with
# --build-arg MARCH=x86-64-v4, AVX-512. Build from the project's root:
#   docker build -f deploy/images/worker-cpu.Dockerfile -t penumbra/worker-cpu:0.1.0 .
FROM python:3.11.14-slim-bookworm AS build
ARG MARCH=x86-64-v3
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md ./
COPY deploy/images/requirements.py deploy/images/requirements.py
RUN python -m venv --without-pip /opt/penumbra \
    && python deploy/images/requirements.py worker-cpu > /tmp/requirements.txt \
    && pip --python /opt/penumbra install --no-cache-dir --no-compile \
        --extra-index-url https://download.pytorch.org/whl/cpu "$(grep ^torch /tmp/requirements.txt)+cpu" \
    && pip --python /opt/penumbra install --no-cache-dir --no-compile -r /tmp/requirements.txt
COPY . .
RUN PENUMBRA_MARCH=$MARCH pip --python /opt/penumbra install --no-cache-dir --no-compile --no-deps .

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="penumbra-worker-cpu" \
      org.opencontainers.image.description="Prefill and decode workers of a Penumbra cluster, on CPUs"
RUN apt-get update && apt-get install --no-install-recommends --yes libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/penumbra /opt/penumbra
ENV PATH=/opt/penumbra/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 50051 50052
ENTRYPOINT ["penumbra"]
CMD ["prefill"]
