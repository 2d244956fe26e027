"""Everything of lever with a tensor in it. Touches the store only through lever_data."""
