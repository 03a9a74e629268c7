"""HTTP routes that loramix adds, one router a file."""
