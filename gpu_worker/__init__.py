"""The process that prunes and measures; the only place with torch."""
