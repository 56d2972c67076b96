"""Our attention behind the signatures of other libraries."""
