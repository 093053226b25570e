# Two images: `server` (API, relay, migrations; no torch) and `worker` (profiles checkpoints).
FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --system --uid 10001 --home-dir /srv blueprints && mkdir -p /srv/registry /data && chown blueprints /data
WORKDIR /srv/registry
RUN python3 -m venv --upgrade-deps /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./

FROM base AS server
RUN mkdir -p client/gradient_blueprints && touch client/gradient_blueprints/__init__.py \
 && pip install -c constraints.txt -e . --group server
COPY client client
COPY app app
COPY migrations migrations
USER blueprints
ENV BLUEPRINTS_STORE=/data/store
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
CMD ["python", "-m", "app", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS worker
# A CPU build unless told otherwise: --build-arg TORCH=torch==2.13.0 takes the CUDA build.
ARG TORCH=torch==2.13.0+cpu
RUN pip install -c constraints.txt "$TORCH" \
 || (pip install uv && uv pip install -c constraints.txt --python /opt/venv/bin/python --torch-backend=cpu "${TORCH%+cpu}")
RUN mkdir -p client/gradient_blueprints && touch client/gradient_blueprints/__init__.py \
 && pip install -c constraints.txt -e '.[torch]' --group worker
COPY client client
COPY worker worker
USER blueprints
ENV BLUEPRINTS_ALLOWED_ROOTS=/data/sources BLUEPRINTS_CACHE=/data/cache HOME=/tmp
CMD ["python", "-m", "worker"]
