"""How throughput grows with workers: distillation, training, serving and tensor parallelism, measured in parts."""
