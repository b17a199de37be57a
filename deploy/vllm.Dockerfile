# The attached model in vLLM, with the plugin of this package.
#   docker build -f deploy/vllm.Dockerfile -t shadowtune-vllm .
#   docker run --gpus all -p 8000:8000 -v ./runs:/runs:ro -e SHADOWTUNE_API_KEYS=... shadowtune-vllm /runs/clinc150
# A base from the Hub is fetched at the first start; mount a volume at /home/shadowtune/.cache to keep it.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /opt/shadowtune
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# without dependencies: vLLM pins its own, and `make vllm` tests the plugin with these
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 1000 shadowtune
USER shadowtune
WORKDIR /home/shadowtune
ENV VLLM_PYTHON=python3

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# --host=0.0.0.0: who may reach it is decided by -p, and by the key
ENTRYPOINT ["shadowtune", "serve", "cloud", "--engine=vllm", "--host=0.0.0.0", "--port=8000"]
