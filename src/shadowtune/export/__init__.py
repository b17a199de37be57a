"""Files of the detached shadow: plain transformers directories, GGUF and ONNX, each checked before it is kept."""
