"""An output's tables where other tools look: TensorBoard, Weights & Biases, CSV."""
