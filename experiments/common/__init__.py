"""What every experiment shares: data, models, the loop, the report."""
