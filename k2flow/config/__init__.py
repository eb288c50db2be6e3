"""Settings: read from the environment, from files of secrets, and from PyIceberg's configuration."""
