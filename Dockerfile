# docker build -t unperturb .
# Any image with Python 3.11 or later will do: --build-arg BASE_IMAGE=nvidia/cuda:… with Python in it, for example.
# torch's own wheels bring the CUDA libraries; the host brings the driver and the NVIDIA container toolkit.
# A tag moves; --build-arg BASE_DIGEST=sha256:… pins the image that was looked at:
#   docker buildx imagetools inspect python:3.11-slim --format '{{.Manifest.Digest}}'
ARG BASE_IMAGE=python:3.11-slim
ARG BASE_DIGEST=
FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}}

# Optional parts, with spaces between: ray, tracing.
ARG EXTRAS=

# The image's own certificates, so that it also builds behind a proxy that has one of its own.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 UV_SYSTEM_CERTS=true PATH=/opt/unperturb/bin:$PATH
WORKDIR /app
RUN python3 -m venv /opt/unperturb && pip install --no-cache-dir --disable-pip-version-check uv

# The dependencies in a layer of their own, so that a change of code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN uv pip install --no-cache --python /opt/unperturb/bin/python --constraint constraints.txt -r pyproject.toml \
    $(for extra in ${EXTRAS}; do echo "--extra ${extra}"; done)
COPY README.md LICENSE ./
COPY unperturb unperturb
COPY models models
COPY training training
COPY service service
COPY benchmarks benchmarks
RUN uv pip install --no-cache --no-deps --python /opt/unperturb/bin/python . \
    && rm -rf unperturb models training service benchmarks build

# Nothing runs as root later on, and no file gives its rights to who starts it.
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} +
RUN useradd --system --uid 10001 --no-create-home unperturb
USER unperturb
# The last one: as in the Makefile, memory is kept between steps.
ENV UNPERTURB_HOST=0.0.0.0 UNPERTURB_PORT=8000 HOME=/tmp \
    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296
EXPOSE 8000
# Past http_proxy, which a host's Docker may set in every container.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['UNPERTURB_PORT'] + '/readyz', timeout=4)"]
CMD ["unperturb", "serve"]
