"""Results files, tables, pictures and pages."""
