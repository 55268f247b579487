"""Results → CSV, tables, plots, pages."""
