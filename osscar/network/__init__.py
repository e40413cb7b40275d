"""What any network has: modules, operations, predictions."""
