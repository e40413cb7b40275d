"""What proves a bound, checked without the search that found it."""
