# The attached model behind OpenAI's API.
#   docker build -f deploy/cloud.Dockerfile -t shadowtune-cloud .
#   docker run -p 8000:8000 -v ./runs:/runs:ro -e SHADOWTUNE_API_KEYS=... shadowtune-cloud /runs/clinc150
# A base from the Hub is fetched at the first start; mount a volume at /home/shadowtune/.cache to keep it.
FROM python:3.12-slim

WORKDIR /opt/shadowtune
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt '.[serve,smollm2,quant]'

RUN useradd --create-home --uid 1000 shadowtune
USER shadowtune
WORKDIR /home/shadowtune

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# --host=0.0.0.0: who may reach it is decided by -p, and by the keys
ENTRYPOINT ["shadowtune", "serve", "cloud", "--host=0.0.0.0", "--port=8000"]
