# The detached model behind OpenAI's API, with a cloud for what it defers.
#   docker build -f deploy/edge.Dockerfile -t shadowtune-edge .
#   docker run -p 8000:8000 -v ./robot-int8:/model:ro shadowtune-edge /model --cloud http://cloud:8000
FROM python:3.12-slim

WORKDIR /opt/shadowtune
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# the edge computes on the processor: torch without CUDA is a tenth of the size
RUN pip install --no-cache-dir -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt '.[serve,export]'

RUN useradd --create-home --uid 1000 shadowtune
USER shadowtune
WORKDIR /home/shadowtune

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# --host=0.0.0.0: who may reach it is decided by -p, and by the keys
ENTRYPOINT ["shadowtune", "serve", "edge", "--host=0.0.0.0", "--port=8000"]
