"""What each group keeps: curves, costs, and one search over prices."""
