"""Files that are whole or absent, and the results kept in them."""
