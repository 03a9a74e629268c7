"""The subcommands of `loramix`, one a file."""
