"""Where weights come from: our own format, official files, and reading others' files without running them."""
