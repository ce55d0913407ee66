"""The `medusa` command: the one package that may import both shells."""
