"""Built-in exporters, one format per folder; none imports another but ``onnx`` and what ``runners`` holds for all."""
