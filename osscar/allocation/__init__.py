"""What each group keeps: curves, costs, and the knapsack of a budget."""
