"""One function per stage; each loads records, calls the floors below and saves records."""
