"""The ONNX exporter's graph in, an OpenVINO IR out, and its runtime to run it."""
