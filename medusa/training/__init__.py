"""Training the heads: batches with shifted labels, the chunked loss, the trainer. Torch only, one process each."""
