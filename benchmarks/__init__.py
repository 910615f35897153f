"""What is fast, measured. A regular package, since another distribution installs one of the same name."""
