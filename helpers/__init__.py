"""tunebook's helpers: one noun a module; import the one you need."""
