"""The parent process of a worker: claims candidates, renews leases, commits outcomes. Start with worker.py."""
