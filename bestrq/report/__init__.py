"""Result files, tables, charts and HTML pages."""
