"""Steps shared by the scripts; may import both libraries."""
