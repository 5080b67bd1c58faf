"""What a run does, step by step; knows only redone.api."""
