"""What a configuration will need and take, before it is queued: memory, seconds, layouts. No torch, no
vendor."""
