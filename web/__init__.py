"""What the item service needs besides its table, its resources and its entry point."""
