"""The parts of the item service besides its tables, endpoints and entry point."""
