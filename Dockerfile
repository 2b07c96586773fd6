# The appliance as an image. `docker build -t appliance .` makes the one for NVIDIA GPUs; README.md says more.
#
#   base    what both stages below start from: BASE and a Python
#   wheels  the dependencies, checked against the lock's hashes: changes with pyproject.toml
#   app     the code, compiled to bytecode, and what Triton would compile in C
#   last    base, dependencies, code; no compiler and no pip

# Any base of Debian's family with Python 3.11 or newer on board or in its archive. torch's wheels bring their own CUDA
# libraries, so the smallest of NVIDIA's images, with the CUDA runtime alone, is enough. With nvcc and g++ in the base
# (a `-devel-` tag) FlashInfer can compile its kernels, and serves attention.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS base
# hadolint ignore=DL3008
RUN python3 -c 'import sys, ssl, sqlite3; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
      apt-get update \
      && apt-get install -y --no-install-recommends ca-certificates python3 \
      && apt-get clean \
      && rm -rf /var/lib/apt/lists/*; }


FROM base AS wheels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --without-pip /opt/venv
# Which lock: requirements-TARGET.lock. `cuda` is in the repository; `make lock-local` writes `local`.
ARG TARGET=cuda
COPY requirements-${TARGET}.lock /tmp/requirements.lock
# pip reads these from its environment: where wheels come from, if not from where it looks by itself.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
      --no-deps --only-binary :all: --require-hashes --requirement /tmp/requirements.lock \
    && python3 -m pip --python /opt/venv/bin/python check


FROM wheels AS app
WORKDIR /opt/appliance
COPY LICENSE entrypoint.py ./
COPY profiles profiles
COPY appliance appliance
# Bytecode by digest and not by time, which copies change. Nothing is compiled for Triton where it is not installed.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash appliance entrypoint.py \
    && if /opt/venv/bin/python -c 'import triton' 2>/dev/null; then \
         /opt/venv/bin/python -m appliance.kernels.prebuilt prebuilt; fi \
    && mkdir -p prebuilt && chmod -R a+rX .


FROM base
# The cache: for UID 1000, and for any UID in GID 0. Mount a volume here to keep engines and downloads.
RUN mkdir -p /opt/nim/.cache \
    && chown 1000:0 /opt/nim /opt/nim/.cache \
    && chmod 775 /opt/nim /opt/nim/.cache \
    && ln -s /opt/appliance/entrypoint.py /usr/local/bin/appliance
COPY --from=wheels /opt/venv /opt/venv
COPY --from=app /opt/appliance /opt/appliance

# HOME and USER: a UID without an entry in /etc/passwd has neither. Nothing else is written but the cache and /tmp.
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    USER=appliance \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:0
WORKDIR /opt/appliance
EXPOSE 8000
STOPSIGNAL SIGTERM
# Healthy means ready: an answer is possible. A first start may build an engine, so failures count after an hour only;
# nothing that restarts containers should act on this sooner (Kubernetes does not look at it: the chart has probes).
HEALTHCHECK --interval=10s --timeout=10s --start-period=1h --retries=6 \
    CMD ["/opt/venv/bin/python", "/opt/appliance/entrypoint.py", "health"]
ENTRYPOINT ["/opt/venv/bin/python", "/opt/appliance/entrypoint.py"]

ARG VERSION=0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG BASE
LABEL org.opencontainers.image.title="appliance" \
      org.opencontainers.image.description="An open, self-optimizing inference appliance for language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
