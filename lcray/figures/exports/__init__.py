"""Exports of an output's tables to other tools: TensorBoard, Weights & Biases, CSV."""
