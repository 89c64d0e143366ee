"""Token files of other projects, read and written: one module a format, and a registry that recognises them."""
