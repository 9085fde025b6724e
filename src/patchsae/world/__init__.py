"""The drawn world: scenes with ground truth, the mini CLIP's training, its probes."""
