"""Where images come from: arrays, folders, CoOp's benchmarks, the hub, masks."""
