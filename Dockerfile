# syntax=docker/dockerfile:1
# `vivit-hf serve` on CPUs. Build it in the repository, and see docs/serving.md:
#
#     docker build -t vivit-hf .
#     docker run --rm --read-only --tmpfs /tmp -p 8000:8000 vivit-hf

FROM python:3.12-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/vivit
ENV PATH=/opt/vivit/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# By itself, so that a change of the code does not download it again.
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src src
RUN pip install -c constraints.txt ".[serve]"

FROM python:3.12-slim
COPY --from=build /opt/vivit /opt/vivit
RUN useradd --system --create-home --uid 10001 vivit
USER 10001
WORKDIR /home/vivit
# Threads that decode and classify give memory back sooner with few arenas. Models are kept in HF_HOME: mount a volume.
ENV PATH=/opt/vivit/bin:$PATH MALLOC_ARENA_MAX=2 HF_HOME=/home/vivit/models PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
# Loading a model from the Hub may take minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["vivit-hf", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD []
