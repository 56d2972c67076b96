"""Our attention behind the signature of a library that is only a yardstick."""
