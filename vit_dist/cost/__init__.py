"""What a run takes: bytes, operations, seconds."""
