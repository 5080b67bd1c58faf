"""What the user sees and keeps: metrics, samples, report."""
