"""The operations of a decoding step that want a kernel of their own; each has a plain torch reference."""
