"""Training frameworks that load a plugin by its name. Nothing else imports these files."""
