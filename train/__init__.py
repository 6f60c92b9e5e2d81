"""One script per experiment, launched by `accelerate launch train/<name>.py`, over the engine in train/engine."""
