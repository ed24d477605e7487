"Sparse models on disk: safetensors and ONNX"
