"""The paper's tables, cell by cell and resumable. Start with __main__.py."""
