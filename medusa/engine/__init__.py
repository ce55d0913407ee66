"""The inference engine: sequence, scheduler, KV cache, runner, speculation policy, and the engine that holds them."""
