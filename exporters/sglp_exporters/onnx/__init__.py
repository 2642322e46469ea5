"""A pruned model in, an ONNX graph out, and ONNX Runtime to run it."""
