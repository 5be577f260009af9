# The base of both stages: the environment built in the first must find the same Python in the second.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ENV UV_PROJECT_ENVIRONMENT=/opt/farebox \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir --root-user-action=ignore "uv==0.13.9"
WORKDIR /src
# The dependencies are a layer of their own: a change of our code does not install them again.
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-dev --no-install-project
COPY README.md LICENSE ./
COPY config ./config
COPY keys ./keys
COPY billing ./billing
COPY migrations ./migrations
COPY gateway ./gateway
COPY bench ./bench
RUN uv sync --locked --no-dev --no-editable

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Farebox" \
      org.opencontainers.image.description="A metering gateway for LLM APIs" \
      org.opencontainers.image.licenses="Apache-2.0"
# The code belongs to root and is read-only for the service; only /data is its own.
RUN useradd --system --uid 10001 --user-group --home-dir /data --no-create-home farebox \
    && install --directory --owner=farebox --group=farebox --mode=0700 /data
COPY --from=build /opt/farebox /opt/farebox
ENV PATH=/opt/farebox/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FAREBOX_SERVER__HOST=0.0.0.0
# By number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 10001:10001
# The default --data-dir is .farebox in the current folder, for every verb.
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8080
# No proxy variable is honoured here, unlike in urllib. Any status but 200 is unhealthy.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('FAREBOX_SERVER__PORT', '8080')), timeout=2); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
# Running streams may finish after SIGTERM: give `docker stop --time` more than server.drain_timeout_s.
ENTRYPOINT ["farebox"]
CMD ["serve"]
