"""How many GPUs and hours: pure functions of a config, a load, and the figures in figures.yaml."""
