"""The worlds that models are trained in: data, file formats and scoring, one package a task.

A task gives `train` and `val` datasets addressed by index, `collate`, `num_items`, the score to monitor and its
direction, and `evaluate(predict)`. It holds plain tensors, arrays and files, and knows no model and no training loop.
"""
