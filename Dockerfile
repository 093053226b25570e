# Three images: `server` (API, relay, migrations; no torch), `worker` (profiles checkpoints), and `gateway`, the one
# published port in front of any number of APIs. To pin the base to the byte:
#   --build-arg PYTHON=python:3.11-slim-bookworm@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

# What is installed, in the versions of constraints.txt; pip stays behind here.
FROM ${PYTHON} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/registry
RUN python3 -m venv --upgrade-deps /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt LICENSE ./
# Stand-ins for our own files, so that a change of these installs nothing anew.
RUN mkdir -p client/gradient_blueprints && touch client/gradient_blueprints/__init__.py README.md

FROM packages AS server-packages
COPY pyproject.toml ./
RUN pip install -c constraints.txt -e . --group server && pip uninstall --yes setuptools pip \
 && cd /opt/venv/lib/python3.11/site-packages && find numpy scipy matplotlib -type d -name tests -exec rm -rf {} +

FROM packages AS worker-packages
# A CPU build unless told otherwise: --build-arg TORCH=torch==2.13.0 takes the CUDA build.
ARG TORCH=torch==2.13.0+cpu
ARG UV=uv==0.13.9
# The CPU build is not on PyPI. Where pip has no other source, uv knows where it lies.
RUN pip install -c constraints.txt "$TORCH" \
 || { [ "${TORCH%+cpu}" != "$TORCH" ] && pip install "$UV" \
 && uv pip install -c constraints.txt --python /opt/venv/bin/python --torch-backend=cpu "${TORCH%+cpu}" \
 && pip uninstall --yes uv; }
COPY pyproject.toml ./
RUN pip install -c constraints.txt -e '.[torch]' --group worker && pip uninstall --yes setuptools pip

FROM ${PYTHON} AS runtime
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Touched by relay and worker while they do their work; how old it is says how they are.
ENV BLUEPRINTS_HEARTBEAT=/tmp/heartbeat
RUN useradd --system --uid 10001 --no-create-home --home-dir /tmp blueprints \
 && mkdir -p /data/store /data/cache && chown -R blueprints /data
WORKDIR /srv/registry
USER blueprints

FROM runtime AS server
COPY --from=server-packages /opt/venv /opt/venv
COPY client client
COPY app app
COPY migrations migrations
ENV BLUEPRINTS_STORE=/data/store
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
CMD ["python", "-m", "app", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS worker
COPY --from=worker-packages /opt/venv /opt/venv
COPY client client
COPY worker worker
ENV BLUEPRINTS_ALLOWED_ROOTS=/data/sources BLUEPRINTS_CACHE=/data/cache
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD find "$BLUEPRINTS_HEARTBEAT" -newermt '1 minute ago' | grep -q .
# Jobs' folders lie in the cache's volume, so that cached files get a second name there instead of a copy. All workers make
# theirs in the same place, where each start removes what killed ones left (worker/folders.py).
CMD ["sh", "-c", "export TMPDIR=/data/cache/scratch && mkdir -p $TMPDIR && exec python -m worker"]

FROM ${PYTHON} AS gateway
RUN apt-get update && apt-get install -y --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
COPY deploy/haproxy.cfg /etc/haproxy/haproxy.cfg
USER haproxy
EXPOSE 8080
# Finishes the answers and uploads under way; SIGTERM cuts them.
STOPSIGNAL SIGUSR1
# Through the gateway to an API and its database.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
CMD ["haproxy", "-W", "-db", "-f", "/etc/haproxy/haproxy.cfg"]
