"""What ships with the package: built-in text and a small trained model."""
