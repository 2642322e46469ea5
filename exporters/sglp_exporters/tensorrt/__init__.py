"""The ONNX exporter's graph in, an engine or a kit that builds one out, and TensorRT to run it."""
