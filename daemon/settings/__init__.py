"""Every setting, its sources, and the sentences about invalid ones. Start with settings.py."""
