"""From prompts to groups of scored rollouts, and from groups to a training batch."""
