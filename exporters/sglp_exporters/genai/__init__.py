"""A pruned checkpoint in, ONNX Runtime GenAI's own graph out, and its runtime to run it."""
