# The server with its workers as subprocesses of one container.
#
#   docker build -t afd-server .
#   docker run -p 8000:8000 -v afd-models:/models afd-server

FROM python:3.11-slim AS build

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*
# Another index, if the CPU build of torch is to come from one.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
RUN python -m venv /opt/afd-server
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY afd_server ./afd_server
RUN /opt/afd-server/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim

# tini is process 1: it passes signals on and reaps orphans.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 afd \
    && install -d -o afd -g afd /models
COPY --from=build /opt/afd-server /opt/afd-server
ENV PATH=/opt/afd-server/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AFD_CACHE_DIR=/models
USER afd
WORKDIR /home/afd
VOLUME /models
EXPOSE 8000
# The first start fetches the model; until then nothing answers.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/live', timeout=2)"]
ENTRYPOINT ["tini", "--", "afd-server"]
CMD ["serve", "--host", "0.0.0.0", "--launcher", "local"]
