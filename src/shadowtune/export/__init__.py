"""The detached shadow as files: plain transformers directories, GGUF, ONNX; each checked before it is kept."""
