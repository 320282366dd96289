"""What a sweep's numbers look like: pictures."""
