"""The only Ray here: placement, actors, the driver's view of them."""
