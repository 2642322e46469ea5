"""An artifact in, logits out: what the runners of several formats share."""
