"""Weight exchange: plan, channel, digests, all-or-nothing update, canary."""
