# syntax=docker/dockerfile:1
# The router: no torch, no NIXL, no compiler. Build from the project's root:
#   docker build -f deploy/images/router.Dockerfile -t penumbra/router:0.1.0 .
FROM python:3.11.14-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml setup.py README.md ./
COPY deploy/images/requirements.py deploy/images/requirements.py
RUN python -m venv --without-pip /opt/penumbra \
    && python deploy/images/requirements.py router > /tmp/requirements.txt \
    && pip --python /opt/penumbra install --no-cache-dir --no-compile -r /tmp/requirements.txt
COPY . .
# There is no compiler here, so no CPU kernels are built, and the router needs none.
RUN pip --python /opt/penumbra install --no-cache-dir --no-compile --no-deps .

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="penumbra-router" \
      org.opencontainers.image.description="HTTP in, tokens out: the router of a Penumbra cluster"
COPY --from=build /opt/penumbra /opt/penumbra
ENV PATH=/opt/penumbra/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["penumbra"]
CMD ["router"]
