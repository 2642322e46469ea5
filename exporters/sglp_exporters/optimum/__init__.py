"""A pruned checkpoint in, the ONNX graph that optimum makes of it out."""
