"""The model registry: MLflow aliases, digests and gate tags; stands below both shells."""
